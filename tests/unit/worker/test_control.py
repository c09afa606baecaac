"""The connection between a rank and its agent, over real pipes: orders in, reports out, and the end of either side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import pytest

from launcher.errors import AGENT_LOST_EXIT
from launcher.worker.control import Control
from tests.time_limit import TIME_LIMIT_SECONDS

HEAD = """
import json, os, sys, time
from launcher.worker.control import Control
control = Control.from_environment()
def report(kind, **details): control.report({"report": kind, "time": 1.5, **details})
"""


class Rank:
    """A Python process as an agent starts a rank: orders on standard input, reports on a pipe of their own."""

    def __init__(self, body: str) -> None:
        report_in, report_out = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + body],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LAUNCHER_REPORT_FD": str(report_out)},
            pass_fds=(report_out,),
        )
        os.close(report_out)
        self.reports = os.fdopen(report_in, "rb")

    @property
    def orders(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def order(self, **order: Any) -> None:
        self.orders.write(json.dumps(order).encode() + b"\n")
        self.orders.flush()

    def report(self) -> dict[str, Any]:
        """The next report, which is waited for."""
        found: dict[str, Any] = json.loads(self.reports.readline())
        return found

    def exit_status(self) -> int:
        return self.process.wait(TIME_LIMIT_SECONDS)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


@contextlib.contextmanager
def rank_that(body: str) -> Iterator[Rank]:
    rank = Rank(body)
    try:
        yield rank
    finally:
        rank.process.kill()
        rank.process.wait()
        rank.reports.close()
        for pipe in (rank.process.stdin, rank.process.stderr):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def test_the_order_to_go_is_returned_and_a_report_reaches_the_agent() -> None:
    with rank_that("report('got', go=control.wait_for_go()); control.wait_for_go()") as rank:
        rank.order(go={"env": {"MASTER_PORT": "1"}, "start": None})
        assert rank.report() == {"report": "got", "time": 1.5, "go": {"env": {"MASTER_PORT": "1"}, "start": None}}


def test_an_order_that_comes_before_it_is_waited_for_is_kept() -> None:
    with rank_that("time.sleep(0.2); report('got', go=control.wait_for_go())") as rank:
        rank.order(go={"number": 1})
        assert rank.report()["go"] == {"number": 1}
        assert rank.exit_status() == 0


def test_an_order_to_stop_sets_stop_and_is_no_order_to_go() -> None:
    body = """
report("stop", set=control.stop.is_set())
report("stop", set=control.stop.wait(60))
report("got", go=control.wait_for_go())
"""
    with rank_that(body) as rank:
        assert rank.report()["set"] is False
        rank.order(stop=True)
        assert rank.report()["set"] is True
        rank.order(go={"number": 2})
        assert rank.report()["go"] == {"number": 2}


def test_an_unknown_order_is_ignored() -> None:
    with rank_that("go = control.wait_for_go(); report('got', go=go, stop=control.stop.is_set())") as rank:
        rank.order(other=True)
        rank.order(go={})
        report = rank.report()
        assert (report["go"], report["stop"]) == ({}, False)


DAMAGED = [b'{"stop": tr', b"not JSON", b'["go"]', b"3", b"\xff\x00"]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_order_is_logged_and_skipped(line: bytes) -> None:
    body = "report('got', go=control.wait_for_go(), stop=control.stop.is_set())\nwhile True: time.sleep(0.01)"
    with rank_that(body) as rank:
        rank.orders.write(line + b"\n")
        rank.order(go={"number": 1})
        report = rank.report()
        assert (report["go"], report["stop"]) == ({"number": 1}, False)
        rank.orders.close()
        assert rank.exit_status() == AGENT_LOST_EXIT
        (logged,) = rank.errors().splitlines()
        assert logged == f"skipped an order from the agent that is not a JSON object: {line!r}"


def test_a_rank_exits_if_its_agent_is_gone_in_the_middle_of_an_order() -> None:
    """Then nobody reads its standard error either."""
    with rank_that("report('at work')\nwhile True: time.sleep(0.01)") as rank:
        assert rank.report()["report"] == "at work"
        assert rank.process.stderr is not None
        rank.process.stderr.close()
        rank.orders.write(DAMAGED[0])
        rank.orders.close()
        assert rank.exit_status() == AGENT_LOST_EXIT


def test_an_event_names_its_kind_and_its_details() -> None:
    before = time.time()
    with rank_that("control.record_event({'event': 'spike', 'update': 42, 'lr': 1e-5})") as rank:
        report = rank.report()
        assert before <= report.pop("time") <= time.time()
        assert report == {"report": "event", "event": "spike", "details": {"update": 42, "lr": 1e-5}}


def test_a_rank_ends_itself_once_its_agent_is_gone() -> None:
    """Also one that computes and waits for no order; what holds its report pipe open does not keep it."""
    with rank_that("report('at work')\nwhile True: time.sleep(0.01)") as rank:
        assert rank.report()["report"] == "at work"
        rank.orders.close()
        assert rank.exit_status() == AGENT_LOST_EXIT == 113
        assert rank.reports.read() == b""


def test_a_rank_that_waits_for_its_order_ends_itself_too() -> None:
    with rank_that("report('ready'); control.wait_for_go(); report('never')") as rank:
        assert rank.report()["report"] == "ready"
        rank.orders.close()
        assert rank.exit_status() == AGENT_LOST_EXIT
        assert rank.reports.read() == b""


def test_a_report_into_a_broken_pipe_raises() -> None:
    body = """
control.wait_for_go()
try:
    report("lost")
except BrokenPipeError:
    os._exit(7)
"""
    with rank_that(body) as rank:
        rank.reports.close()
        rank.order(go={})
        assert rank.exit_status() == 7, rank.errors()


def test_without_an_agent_nothing_is_waited_for_and_reports_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCHER_REPORT_FD", raising=False)
    threads = threading.active_count()
    control = Control.from_environment()
    assert control.wait_for_go() == {"env": {}}
    control.report({"report": "phase", "time": 1.5, "phase": "training"})
    control.record_event({"event": "outlier", "update": 1, "reason": "high"})
    assert not control.stop.is_set()
    assert threading.active_count() == threads


def test_what_a_rank_starts_does_not_inherit_the_name_of_its_pipe() -> None:
    with rank_that("report('left', name=os.environ.get('LAUNCHER_REPORT_FD'))") as rank:
        assert rank.report()["name"] is None


def test_reports_of_several_threads_are_whole_lines() -> None:
    """Longer than a pipe takes in one write."""
    body = """
import threading
threads = [threading.Thread(target=report, args=("long",), kwargs={"text": str(n) * 100_000}) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    with rank_that(body) as rank:
        texts = sorted(json.loads(line)["text"] for line in rank.reports)
        assert texts == [str(number) * 100_000 for number in range(8)]
        assert rank.exit_status() == 0
