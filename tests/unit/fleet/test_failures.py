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
def test_the_exception_comes_before_the_ranks_that_fell_after_it(seed: int) -> None:
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


def test_what_a_rank_reports_counts_before_its_exit() -> None:
    coded = failed(0, 5.0) | {"code": "out_of_step"}
    for exit_code in (1, -9, -15):
        found = first_failure([coded, ended(0, 5.5, exit_code)])
        assert found is not None and (found.code, found.exit_code) == (FailureCode.OUT_OF_STEP, exit_code)
    # An exception of a library has no code, and the grace time's kill does not give it one.
    found = first_failure([failed(0, 5.0), ended(0, 5.5, -9)])
    assert found is not None and found.code is FailureCode.UNKNOWN


def test_an_exception_counts_before_its_exit_was_seen() -> None:
    assert first_failure([failed(2, 5.0)]) == Failure(2, 1, 5.0, "an exception", "ValueError: boom")


def test_a_lost_node_is_not_one_of_its_ranks() -> None:
    lost = {"report": "node-lost", "node_rank": 1, "time": 3.0, "message": "no answer"}
    found = first_failure([ended(1, 4.0, 1), lost])
    assert found == Failure(None, 1, 3.0, "the node's agent is gone: no answer", code=FailureCode.NODE_LOST)


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (2, "exit code 2"), (-11, "signal SIGSEGV"), (-99, "signal 99")]
)
def test_exits_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


def test_a_peer_that_says_it_lost_the_killed_one_a_little_earlier_is_not_the_first() -> None:
    lost = failed(0, 10.0, "[gloo] Connection closed by peer [127.0.0.1]:4242")
    found = all_failures([lost, ended(1, 10.05, -9), ended(0, 10.4, 1)])
    assert [(failure.rank, failure.how) for failure in found] == [(1, "signal SIGKILL"), (0, "exit code 1")]
    # Much later, it is a failure of its own.
    assert [failure.rank for failure in all_failures([lost, ended(1, 19.0, -9)])] == [0, 1]


def test_times_are_corrected_by_the_nodes_clocks() -> None:
    # Node 1's clock is five seconds ahead.
    found = all_failures([failed(0, 101.0), failed(2, 105.5)], [0.0, 5.0])
    assert [(failure.rank, failure.time) for failure in found] == [(2, 100.5), (0, 101.0)]
