"""Decides whether a failed run starts again. Pure: the caller gives the failures so far."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import FailureCode
from launcher.fleet.node_failures import OF_DEVICES

DEFAULT_RESTARTS = 3
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 5.0, 60.0
_NOT_AGAIN = frozenset(
    {
        FailureCode.USER_ERROR,
        FailureCode.PLAN_DAMAGED,
        FailureCode.PLAN_DIFFERS,
        FailureCode.VERSIONS_DIFFER,
        FailureCode.DATA_DIFFERS,
        FailureCode.NODE_UNFIT,
        FailureCode.NODE_FAULTY,
        FailureCode.PACKAGE_MISSING,
        FailureCode.NOT_SHARED,
        FailureCode.NOT_ENOUGH_NODES,
        FailureCode.SUPERVISOR_LOST,
        FailureCode.DISK_FULL,
        FailureCode.PERMISSION,
        FailureCode.MISSING_FILE,
        FailureCode.OUT_OF_STEP,
        FailureCode.NAN_LOSS,
        FailureCode.LOSS_SPIKE,
        FailureCode.NAN_WEIGHTS,
        FailureCode.CHECKPOINT_DAMAGED,
        FailureCode.WEIGHTS_DIFFER,
        FailureCode.PREPARE_FAILED,
    }
)
"""A restart would fail in the same way, or would hide what the user must decide."""
_FROM_OUTSIDE = frozenset(
    {
        FailureCode.NODE_LOST,
        FailureCode.NODE_DRAINED,
        FailureCode.AGENT_LOST,
        FailureCode.ENDED,
        FailureCode.PEER_LOST,
        FailureCode.TIMEOUT,
        FailureCode.RANK_KILLED,
        FailureCode.NETWORK,
        FailureCode.RAY_LOST,
    }
)
"""Failures of machines and networks: that one repeats at the same update is a coincidence."""
_ERRORS_OF_CODE = (
    *("AssertionError", "AttributeError", "ImportError", "IndexError", "KeyError", "ModuleNotFoundError"),
    *("NameError", "NotImplementedError", "SyntaxError", "TypeError", "ValueError"),
)
_VARYING = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True)
class FailedAttempt:
    """How an attempt to carry out a plan failed.

    `updates` is the number of updates that were made when it failed. `saved`: it saved a checkpoint of its own. `error`
    is the message of the first failure, starting with the exception's class if there was an exception. `excluded`: a
    node of the attempt is not used any more. `own_ray`: it ran on a Ray that the launcher started, and can start again.
    """

    code: FailureCode
    updates: int
    saved: bool
    error: str
    lost_hosts: tuple[str, ...] = ()
    excluded: bool = False
    own_ray: bool = False


@dataclass(frozen=True)
class Decision:
    """Whether to start again, after a pause in seconds; `reason` explains why not, or counts the restart."""

    restart: bool
    reason: str
    pause_seconds: float = 0.0


def decide(failed: Sequence[FailedAttempt], restarts: int) -> Decision:
    """The decision after the last of the failed attempts, oldest first.

    `restarts` (the job's `train.restarts`) is how many restarts in a row may fail without saving a checkpoint.
    """
    last = failed[-1]
    if restarts == 0:
        return Decision(False, "train.restarts is 0")
    # Without the unfit node it would not fail again.
    if last.code in _NOT_AGAIN and not (last.code in OF_DEVICES and last.excluded):
        return Decision(False, "it would fail again in the same way")
    if last.code is FailureCode.RAY_LOST and not last.own_ray:
        return Decision(False, "the launcher did not start this Ray")
    started_once = any(each.saved or each.updates for each in failed)
    if not started_once and last.code is FailureCode.OUT_OF_GPU_MEMORY:
        return Decision(False, "the GPU memory was full in the first update")
    if not started_once and _is_error_of_code(last):
        return Decision(False, "the error is in the job or the code: it came before the first update")
    if len(failed) > 1 and _repeats(failed[-2], last):
        return Decision(False, f"the same error came twice after {last.updates} updates: it is deterministic")
    used = _restarts_without_progress(failed)
    if used >= restarts:
        times = "restart" if used == 1 else "restarts"
        return Decision(False, f"{used} {times} failed without a new checkpoint (train.restarts={restarts})")
    pause = 0.0 if used == 0 else min(_MAX_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (used - 1))
    return Decision(True, f"{used + 1} of at most {restarts} restarts without a new checkpoint", pause)


def _restarts_without_progress(failed: Sequence[FailedAttempt]) -> int:
    """The number of restarts since the last attempt that saved a checkpoint."""
    progress = [index for index, each in enumerate(failed) if each.saved]
    return len(failed) - 1 - (progress[-1] if progress else 0)


def _is_error_of_code(failure: FailedAttempt) -> bool:
    return failure.code is FailureCode.UNKNOWN and failure.error.startswith(
        tuple(f"{name}:" for name in _ERRORS_OF_CODE)
    )


def _repeats(before: FailedAttempt, last: FailedAttempt) -> bool:
    if last.code in _FROM_OUTSIDE or last.code is FailureCode.HUNG:
        return False
    same = before.code is last.code and before.updates == last.updates
    return same and _VARYING.sub("#", before.error) == _VARYING.sub("#", last.error)
