"""When a failed run starts again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import FailureCode
from launcher.runs.restart_policy import FailedAttempt, decide

KILLED = FailureCode.RANK_KILLED


def failure(
    code: FailureCode = KILLED, updates: int = 5, *, saved: bool = False, error: str = "signal SIGKILL"
) -> FailedAttempt:
    return FailedAttempt(code, updates, saved, error)


@pytest.mark.parametrize(
    "code", [KILLED, FailureCode.NODE_LOST, FailureCode.HUNG, FailureCode.TIMEOUT, FailureCode.RANK_CRASHED]
)
def test_a_first_failure_is_followed_by_a_restart_without_a_pause(code: FailureCode) -> None:
    decision = decide([failure(code)], 3)
    assert decision.restart and decision.pause_seconds == 0
    assert decision.reason == "1 of at most 3 restarts without a new checkpoint"


def test_no_restart_if_the_job_allows_none() -> None:
    assert not decide([failure()], 0).restart


def test_restarts_without_a_new_checkpoint_are_limited_and_pauses_grow() -> None:
    decisions = [decide([failure()] * count, 3) for count in (1, 2, 3, 4)]
    assert [each.restart for each in decisions] == [True, True, True, False]
    assert [each.pause_seconds for each in decisions[:3]] == [0, 5, 10]
    assert decisions[3].reason == "3 restarts failed without a new checkpoint (train.restarts=3)"


def test_a_new_checkpoint_allows_as_many_restarts_again() -> None:
    failed = [failure(), failure(), failure(), failure(saved=True)]
    assert decide(failed, 3) == decide([failure()], 3)
    assert decide([*failed, failure(), failure()], 3).restart
    assert not decide([*failed, failure(), failure(), failure()], 3).restart


@given(
    st.lists(st.builds(failure, st.sampled_from([KILLED, FailureCode.NODE_LOST]), saved=st.booleans()), max_size=12),
    st.integers(1, 5),
)
def test_no_run_of_failures_without_progress_is_longer_than_allowed(failed: list[FailedAttempt], allowed: int) -> None:
    """Simulates a run: each failure either gets a restart or is the last."""
    without = 0
    for count, each in enumerate(failed, start=1):
        without = 0 if each.saved or count == 1 else without + 1
        assert decide(failed[:count], allowed).restart == (without < allowed)
        if without >= allowed:
            return


@pytest.mark.parametrize(
    "code",
    [
        FailureCode.NAN_LOSS,
        FailureCode.OUT_OF_STEP,
        FailureCode.DISK_FULL,
        FailureCode.CHECKPOINT_DAMAGED,
        FailureCode.VERSIONS_DIFFER,
        FailureCode.USER_ERROR,
    ],
)
def test_what_would_fail_again_or_needs_a_decision_is_not_restarted(code: FailureCode) -> None:
    assert not decide([failure(code)], 3).restart


@pytest.mark.parametrize("code", [FailureCode.NODE_UNFIT, FailureCode.NODE_FAULTY])
def test_an_unfit_node_ends_the_run_unless_it_can_do_without_the_node(code: FailureCode) -> None:
    unfit = failure(code, updates=0, error="torch sees 3 of the 4 assigned GPUs")
    assert not decide([unfit], 3).restart
    assert decide([replace(unfit, excluded=True)], 3).restart
    # What is wrong with the job stays wrong without the node.
    assert not decide([replace(failure(FailureCode.NAN_LOSS), excluded=True)], 3).restart


def test_the_same_error_at_the_same_update_is_deterministic() -> None:
    bad = failure(FailureCode.UNKNOWN, 7, error="IndexError: index 4096 is out of range")
    assert decide([bad], 3).restart
    again = failure(FailureCode.UNKNOWN, 7, error="IndexError: index 4097 is out of range")
    decision = decide([bad, again], 3)
    assert (decision.restart, decision.reason) == (
        False,
        "the same error came twice after 7 updates: it is deterministic",
    )


@pytest.mark.parametrize(
    "other",
    [
        failure(FailureCode.UNKNOWN, 8, error="IndexError: index 4096 is out of range"),
        failure(FailureCode.UNKNOWN, 7, error="RuntimeError: CUDA error"),
        failure(KILLED, 7),
    ],
)
def test_another_update_or_another_error_is_not_deterministic(other: FailedAttempt) -> None:
    bad = failure(FailureCode.UNKNOWN, 7, error="IndexError: index 4096 is out of range")
    assert decide([bad, other], 3).restart


def test_a_kill_at_the_same_update_is_a_coincidence() -> None:
    assert decide([failure(updates=7), failure(updates=7)], 3).restart


def test_full_gpu_memory_in_the_first_update_is_not_retried_but_a_later_one_is() -> None:
    full = "OutOfMemoryError: CUDA out of memory"
    assert not decide([failure(FailureCode.OUT_OF_GPU_MEMORY, 0, error=full)], 3).restart
    assert decide([failure(FailureCode.OUT_OF_GPU_MEMORY, 9, error=full)], 3).restart


@pytest.mark.parametrize("error", ["ValueError: bad sample", "KeyError: 'labels'", "ImportError: no flash_attn"])
def test_errors_of_the_code_before_the_first_update_are_not_retried(error: str) -> None:
    assert not decide([failure(FailureCode.UNKNOWN, 0, error=error)], 3).restart
    assert decide([failure(FailureCode.UNKNOWN, 3, error=error)], 3).restart


def test_a_lost_race_for_the_rendezvous_port_is_retried() -> None:
    error = "DistNetworkError: The server socket has failed to listen on any local network address. EADDRINUSE"
    assert decide([failure(FailureCode.UNKNOWN, 0, error=error)], 3).restart


def test_only_a_ray_that_the_launcher_started_can_be_replaced() -> None:
    own = FailedAttempt(FailureCode.RAY_LOST, 5, False, "Ray's head process is gone", own_ray=True)
    assert decide([own], 3).restart and decide([own, own], 3).restart
    decision = decide([replace(own, own_ray=False)], 3)
    assert (decision.restart, decision.reason) == (False, "the launcher did not start this Ray")
