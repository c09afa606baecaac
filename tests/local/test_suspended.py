"""Processes of a run that are suspended (SIGSTOP): for a while, which a run survives, and for good."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.local.fault_runs import Start, check_results
from tests.local.launcher_commands import run_folder, updates_made

pytestmark = pytest.mark.local


def test_a_rank_an_agent_and_a_launcher_that_are_suspended_for_a_while_continue(
    started: Start, shared_ray: dict[str, str]
) -> None:
    running = started("none", shared_ray, train={"max_steps": 100_000}, checkpoint={"every": 100_000}, export=False)

    def continues() -> None:
        made = updates_made(running.folder)
        running.wait_for(lambda: updates_made(running.folder) > made + 5)

    continues()
    rank, agent, launcher = running.ranks()[1], running.agent(), psutil.Process(running.process.pid)
    rank.suspend()
    running.wait_for(lambda: rank.status() == psutil.STATUS_STOPPED)
    time.sleep(2)
    rank.resume()
    continues()
    agent.suspend()
    running.wait_for(lambda: "has not answered for 5 s" in running.output)
    agent.resume()
    running.wait_for(lambda: "answers again" in running.output)
    continues()
    launcher.suspend()
    continues()
    launcher.resume()
    running.interrupt(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM, running.output
    run = RunDir(run_folder(running.folder))
    assert (run.state()["state"], run.attempt()) == ("stopped", 1)
    assert [line["update"] for line in run.metrics()] == list(range(len(run.metrics())))


def test_an_agent_that_is_suspended_for_good_is_lost_and_replaced(
    without_fault: dict[str, object], started: Start, shared_ray: dict[str, str]
) -> None:
    sooner = (
        "import launcher.fleet.answer_times as a, launcher.fleet.nodes as n; a.LOST_SECONDS = n.LOST_SECONDS = 12.0"
    )
    running = started("training", shared_ray, sooner)
    running.look()
    running.agent().suspend()
    check_results(running, without_fault, attempts=2)
    (restart,) = [event for event in RunDir(run_folder(running.folder)).events() if event["event"] == "restart"]
    assert restart["reason"].startswith("node 0 (") and restart["reason"].endswith("no answer for 12 s")
