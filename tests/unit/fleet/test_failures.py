"""Which rank failed first, from what agents report."""

from __future__ import annotations

import random
from typing import Any

import pytest

from launcher.errors import FailureCode
from launcher.fleet.failures import Failure, all_failures, describe_exit, first_failure


def failed(rank: int, time: float, message: str = "boom") -> dict[str, Any]:
    return {
        "report": "failed",
        "rank": rank,
        "node_rank": rank // 2,
        "time": time,
        "error": "ValueError",
        "message": message,
    }


def ended(rank: int, time: float, code: int) -> dict[str, Any]:
    return {"report": "exit", "rank": rank, "node_rank": rank // 2, "time": time, "code": code}


def test_nothing_failed() -> None:
    assert first_failure([]) is None
    assert first_failure([ended(0, 1.0, 0), {"report": "update", "rank": 0, "time": 0.5}]) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_exception_comes_before_ranks_that_failed_because_of_it(seed: int) -> None:
    events = [
        failed(3, 10.0),
        ended(3, 10.9, 1),
        ended(0, 10.4, -6),
        failed(1, 10.5, "Connection closed by peer"),
        ended(1, 10.8, 1),
        ended(2, 10.7, -15),
    ]
    random.Random(seed).shuffle(events)
    assert first_failure(events) == Failure(3, 1, 10.0, "exit code 1", "ValueError: boom", exit_code=1)


def test_a_kill_has_no_exception() -> None:
    assert first_failure([ended(1, 5.0, -9), failed(0, 5.2)]) == Failure(
        1, 0, 5.0, "signal SIGKILL", exit_code=-9, code=FailureCode.RANK_KILLED
    )


def test_the_reported_code_wins_over_the_exit_status() -> None:
    coded = failed(0, 5.0) | {"code": "out_of_step"}
    for exit_code in (1, -9, -15):
        found = first_failure([coded, ended(0, 5.5, exit_code)])
        assert found is not None and (found.code, found.exit_code) == (FailureCode.OUT_OF_STEP, exit_code)
    # An exception of a library has no code, and the SIGKILL after the grace time does not change that.
    found = first_failure([failed(0, 5.0), ended(0, 5.5, -9)])
    assert found is not None and found.code is FailureCode.UNKNOWN


def test_an_exception_is_a_failure_before_the_exit_is_known() -> None:
    assert first_failure([failed(2, 5.0)]) == Failure(2, 1, 5.0, "an exception", "ValueError: boom")


def test_a_lost_node_is_a_failure_without_a_rank() -> None:
    lost = {"report": "node-lost", "node_rank": 1, "time": 3.0, "message": "no answer"}
    found = first_failure([ended(1, 4.0, 1), lost])
    assert found == Failure(None, 1, 3.0, "the node's agent is gone: no answer", code=FailureCode.NODE_LOST)


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exit code 0"), (2, "exit code 2"), (-11, "signal SIGSEGV"), (-99, "signal 99")]
)
def test_exit_statuses_are_described(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_a_killed_rank_is_first_though_a_peer_reported_its_loss_slightly_earlier() -> None:
    lost = failed(0, 10.0, "[gloo] Connection closed by peer [127.0.0.1]:4242")
    found = all_failures([lost, ended(1, 10.05, -9), ended(0, 10.4, 1)])
    assert [(failure.rank, failure.how) for failure in found] == [(1, "signal SIGKILL"), (0, "exit code 1")]
    # A kill much later is a separate failure.
    assert [failure.rank for failure in all_failures([lost, ended(1, 19.0, -9)])] == [0, 1]


def test_times_are_corrected_by_clock_offsets() -> None:
    # Node 1's clock is five seconds ahead.
    found = all_failures([failed(0, 101.0), failed(2, 105.5)], [0.0, 5.0])
    assert [(failure.rank, failure.time) for failure in found] == [(2, 100.5), (0, 101.0)]
