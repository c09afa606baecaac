"""Errors: invalid input (exit status 2) and failed runs (exit status 1), each with a machine-readable code."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

AGENT_LOST_EXIT = 113
"""Exit status of a rank whose agent was lost."""


class FailureCode(StrEnum):
    """The kind of a failure, in state.json and in the "failure" event of events.jsonl.

    Messages may be reworded at any time; a code keeps its meaning.
    """

    USER_ERROR = "user_error"
    """Invalid input: nothing was started."""
    PLAN_DAMAGED = "plan_damaged"
    """plan.json cannot be read, was altered, or was written by another version of the launcher."""
    PLAN_DIFFERS = "plan_differs"
    """The ranks do not have the same plan."""
    VERSIONS_DIFFER = "versions_differ"
    """The package versions on a node or a rank differ from those of the plan."""
    DATA_DIFFERS = "data_differs"
    """The data that a node tokenised differs from the plan."""
    NODE_UNFIT = "node_unfit"
    """A node does not have the GPUs that the job requests."""
    NODE_FAULTY = "node_faulty"
    """A device of a node computes wrongly or reports hardware errors."""
    PACKAGE_MISSING = "package_missing"
    """A node does not have a Python package that the DeepSpeed JSON needs."""
    NOT_SHARED = "not_shared"
    """A node cannot read, or cannot write, a file or folder that all nodes need."""
    NOT_ENOUGH_NODES = "not_enough_nodes"
    """The cluster did not provide the nodes in time."""
    NETWORK = "network"
    """Nodes cannot reach each other."""
    RAY_LOST = "ray_lost"
    """Ray did not start, could not be reached, or its head process ended."""
    SUPERVISOR_LOST = "supervisor_lost"
    """The launcher ended without writing a reason: it was killed, or its machine failed."""
    NODE_LOST = "node_lost"
    """A node's agent ended or no longer answers."""
    NODE_DRAINED = "node_drained"
    """Ray drains a node, which will end soon; the run has saved before."""
    AGENT_LOST = "agent_lost"
    """A rank ended itself because its agent was lost: follows another failure."""
    ENDED = "ended"
    """A rank was ended by SIGTERM: follows another failure."""
    PEER_LOST = "peer_lost"
    """A collective failed because another rank was lost: follows another failure."""
    TIMEOUT = "timeout"
    """A collective or a reply timed out."""
    HUNG = "hung"
    """The run made no progress for longer than train.hang_seconds."""
    RANK_KILLED = "rank_killed"
    """A rank was ended by SIGKILL, which always comes from another process or the kernel."""
    RANK_CRASHED = "rank_crashed"
    """A rank crashed: SIGSEGV, SIGBUS, SIGILL, SIGFPE."""
    OUT_OF_MEMORY = "out_of_memory"
    """The node's memory was full, or an allocation failed."""
    OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
    DISK_FULL = "disk_full"
    PERMISSION = "permission"
    MISSING_FILE = "missing_file"
    OUT_OF_STEP = "out_of_step"
    """A rank's update or learning rate differs from the plan."""
    NAN_LOSS = "nan_loss"
    """A loss or a gradient norm was NaN or Inf."""
    LOSS_SPIKE = "loss_spike"
    """The loss spiked, and schedule.on_spike is stop."""
    NAN_WEIGHTS = "nan_weights"
    """The loaded weights contain NaN or Inf."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    """A checkpoint is incomplete or cannot be read."""
    WEIGHTS_DIFFER = "weights_differ"
    """A checkpoint belongs to another model."""
    PREPARE_FAILED = "prepare_failed"
    """The process that measures the model and the data failed."""
    UNKNOWN = "unknown"


class LauncherError(Exception):
    """An error that the launcher reports without a traceback. `code` is its kind."""

    exit_status = 1
    code: FailureCode = FailureCode.UNKNOWN

    def __init__(self, *arguments: object, code: FailureCode | None = None) -> None:
        super().__init__(*arguments)
        if code is not None:
            self.code = code


@dataclass(frozen=True)
class Problem:
    """One problem in the input: where it is, what was found, and a hint."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        head = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{head}\n    {self.hint}" if self.hint else head


class RequestError(LauncherError):
    """Invalid input: nothing was started, and the user can fix every problem listed."""

    exit_status = 2
    code = FailureCode.USER_ERROR

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RunFailed(LauncherError):
    """A run was started and did not finish."""


_ERRNO_CODES = {
    errno.ENOSPC: FailureCode.DISK_FULL,
    errno.EDQUOT: FailureCode.DISK_FULL,
    errno.EACCES: FailureCode.PERMISSION,
    errno.EPERM: FailureCode.PERMISSION,
    errno.EROFS: FailureCode.PERMISSION,
    errno.ENOENT: FailureCode.MISSING_FILE,
    errno.ENOTDIR: FailureCode.MISSING_FILE,
    errno.ESTALE: FailureCode.MISSING_FILE,
    errno.ENOMEM: FailureCode.OUT_OF_MEMORY,
}


def code_of(error: BaseException) -> FailureCode:
    """The code of an exception: a launcher error's own code, the code for an OSError's errno, else unknown.

    A library's exception without an errno is unknown; `launcher why` searches its message for known errors.
    """
    if isinstance(error, LauncherError):
        return error.code
    if isinstance(error, MemoryError):
        return FailureCode.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO_CODES.get(error.errno, FailureCode.UNKNOWN)
    return FailureCode.UNKNOWN


def os_error_text(error: OSError) -> str:
    """The file of the error, if known, and the reason."""
    if error.strerror is None:
        return first_line(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])


def needs_no_traceback(error: BaseException) -> bool:
    """Whether an error is a full disk or a missing permission: a traceback would not help."""
    return isinstance(error, OSError) and code_of(error) in (FailureCode.DISK_FULL, FailureCode.PERMISSION)


def known_code(value: object) -> FailureCode | None:
    """The code in a file's value; None for None, and unknown for a code of a later version."""
    if value is None:
        return None
    try:
        return FailureCode(str(value))
    except ValueError:
        return FailureCode.UNKNOWN


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None
