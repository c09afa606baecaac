"""The agent of a node and its real processes, where the disk is full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.fleet.agent import Agent, NodeTask
from tests.time_limit import TIME_LIMIT_SECONDS

LINES = 50_000
PRINTS = f"for i in range({LINES}): print('a line that cannot be written', i)"
SLEEPS = "import time; print('here', flush=True); time.sleep(600)"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A log folder on a full disk: its files can be opened but not written."""
    folder = tmp_path / "node-0-h0"
    folder.mkdir()
    for name in ("agent.log", "rank-0.log", "rank-1.log"):
        (folder / name).symlink_to("/dev/full")
    return folder


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.end(0.0)


def task(folder: Path, *code: str) -> NodeTask:
    """A task with one rank per piece of code."""
    script = f"import os; exec({list(code)!r}[int(os.environ['RANK'])])"
    return NodeTask(
        node_rank=0,
        first_rank=0,
        processes=len(code),
        world_size=len(code),
        run_dir=str(folder.parent),
        log_folder=str(folder),
        environment=dict(os.environ),
        arguments=("-c", script),
    )


def exits(agent: Agent, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, "an exit was never reported"
        found += [event for event in agent.next_reports(1.0) if event["report"] == "exit"]
    return found


def test_on_a_full_disk_a_rank_that_prints_runs_on_and_its_exit_is_reported(agent: Agent, full: Path) -> None:
    agent.start(task(full, PRINTS, "raise SystemExit(7)"))
    assert {event["rank"]: event["code"] for event in exits(agent, 2)} == {0: 0, 1: 7}


def test_on_a_full_disk_the_agent_can_end_its_ranks(agent: Agent, full: Path) -> None:
    agent.start(task(full, SLEEPS))
    agent.end(TIME_LIMIT_SECONDS)
    assert [event["code"] for event in exits(agent, 1)] == [-15]


def test_nothing_starts_if_the_log_cannot_be_created(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "node-0-h0" / "rank-0.log").mkdir(parents=True)
    before = psutil.Process().children()
    with pytest.raises(IsADirectoryError):
        agent.start(task(tmp_path / "node-0-h0", SLEEPS))
    assert psutil.Process().children() == before
    agent.end(0.0)


def test_a_second_attempt_has_its_own_logs_and_receives_nothing_of_the_first(agent: Agent, tmp_path: Path) -> None:
    folder = tmp_path / "node-0-h0"
    first = "import os, sys; print('first', os.environ['LAUNCHER_ATTEMPT'], flush=True); sys.stdin.read()"
    agent.start(task(folder, first))
    log = folder / "rank-0.log"
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not log.exists() or b"first 1" not in log.read_bytes():
        assert time.monotonic() < deadline
    agent.end(0.0)
    again = replace(task(folder, "import os; raise SystemExit(int(os.environ['LAUNCHER_ATTEMPT']))"), attempt=2)
    agent.start(again)
    assert agent.next_reports(0.0, attempt=1) == []
    found: list[dict[str, Any]] = []
    while not any(report["report"] == "exit" for report in found):
        assert time.monotonic() < deadline
        found += agent.next_reports(1.0, attempt=2)
    assert [report["code"] for report in found if report["report"] == "exit"] == [2]
    assert (folder / "rank-0.attempt-2.log").exists() and b"first" not in (folder / "rank-0.attempt-2.log").read_bytes()


def test_a_call_for_reports_of_an_earlier_attempt_ends_when_the_next_one_starts(agent: Agent, tmp_path: Path) -> None:
    """Otherwise it would take the first reports of the next attempt."""
    folder = tmp_path / "node-0-h0"
    agent.start(task(folder, SLEEPS))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(agent.next_reports, 10 * TIME_LIMIT_SECONDS, 1)
        agent.end(0.0)
        agent.start(replace(task(folder, "raise SystemExit(5)"), attempt=2))
        waiting.result(TIME_LIMIT_SECONDS)
        found: list[dict[str, Any]] = []
        while not found:
            found = agent.next_reports(1.0, attempt=2)
    assert [report["code"] for report in found] == [5]
