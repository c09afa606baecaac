"""The agent of a node and its real processes, where the disk is full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.fleet.agent import Agent, NodeTask
from launcher.tail import Tail
from tests.time_limit import TIME_LIMIT_SECONDS

LINES = 50_000
PRINTS = f"for i in range({LINES}): print('a line that nobody can write down', i)"
SLEEPS = "import time; print('here', flush=True); time.sleep(600)"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A log folder on a full disk: what is there can be opened, and nothing is written to it."""
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
    """A rank for each piece of code."""
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
        assert time.monotonic() < deadline, "a rank's end was never told"
        found += [event for event in agent.next_events(1.0) if event["report"] == "exit"]
    return found


def test_a_full_disk_neither_ends_a_rank_that_prints_nor_hides_its_end(agent: Agent, full: Path) -> None:
    agent.start(task(full, PRINTS, "raise SystemExit(7)"))
    assert {event["rank"]: event["code"] for event in exits(agent, 2)} == {0: 0, 1: 7}


def test_a_full_disk_does_not_keep_the_agent_from_ending_its_ranks(agent: Agent, full: Path) -> None:
    agent.start(task(full, SLEEPS))
    agent.end(TIME_LIMIT_SECONDS)
    assert [event["code"] for event in exits(agent, 1)] == [-15]


def test_a_log_that_cannot_be_made_starts_nothing(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "node-0-h0" / "rank-0.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        agent.start(task(tmp_path / "node-0-h0", SLEEPS))
    agent.end(0.0)


def test_damaged_lines_are_passed_over_by_those_who_follow(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"update": 0}\n{"upd\x00\n[1]\n\xff\n{"update": 1}\n{"upd')
    tail = Tail(file)
    assert tail.new() == [{"update": 0}, {"update": 1}]
    with file.open("a") as more:
        more.write('ate": 2}\n')
    assert tail.new() == [{"update": 2}]
