"""What can go wrong: invalid input (exit status 2) or a failed run (exit status 1), each with a code for programs."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

AGENT_LOST_EXIT = 113
"""Exit status of a rank whose agent disappeared."""


class FailureCode(StrEnum):
    """What kind of failure it is, for programs: in state.json and in the "failure" event of events.jsonl.

    Messages are for people and may be reworded at any time; a code keeps its meaning.
    """

    USER_ERROR = "user_error"
    """Invalid input: nothing was started."""
    PLAN_DAMAGED = "plan_damaged"
    """plan.json cannot be read, was altered, or was written by another version of the launcher."""
    PLAN_DIFFERS = "plan_differs"
    """The ranks do not have the same plan."""
    VERSIONS_DIFFER = "versions_differ"
    """A node or a rank has other package versions than those the run was planned with."""
    DATA_DIFFERS = "data_differs"
    """A node tokenised the data and got something else than what was planned."""
    NODE_UNFIT = "node_unfit"
    """A node does not have the GPUs that it was given."""
    PACKAGE_MISSING = "package_missing"
    """A node does not have a Python package that the DeepSpeed JSON needs."""
    NOT_SHARED = "not_shared"
    """A node does not see, or cannot write, a file or folder that all nodes need."""
    NOT_ENOUGH_NODES = "not_enough_nodes"
    """The cluster did not give the nodes in time."""
    NETWORK = "network"
    """Nodes do not reach each other."""
    RAY_LOST = "ray_lost"
    """Ray did not start, was not reached, or its head process ended."""
    SUPERVISOR_LOST = "supervisor_lost"
    """The launcher itself ended without a word: it was killed, or its machine went down."""
    NODE_LOST = "node_lost"
    """A node's agent ended or no longer answers."""
    AGENT_LOST = "agent_lost"
    """A rank ended itself because its agent was gone: follows another failure."""
    ENDED = "ended"
    """A rank was told to end by SIGTERM: follows another failure."""
    PEER_LOST = "peer_lost"
    """A collective failed because another rank was gone: follows another failure."""
    TIMEOUT = "timeout"
    """A collective, or an answer, did not come within its time."""
    RANK_KILLED = "rank_killed"
    """A rank was ended by SIGKILL, which nothing in the rank itself sends."""
    RANK_CRASHED = "rank_crashed"
    """A rank was ended by a signal of its own making: SIGSEGV, SIGBUS, SIGILL, SIGFPE."""
    OUT_OF_MEMORY = "out_of_memory"
    """The node's memory was full, or an allocation of it was refused."""
    OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
    DISK_FULL = "disk_full"
    PERMISSION = "permission"
    MISSING_FILE = "missing_file"
    OUT_OF_STEP = "out_of_step"
    """A rank is not at the update or the learning rate that the plan has."""
    NAN_LOSS = "nan_loss"
    """A loss or a gradient norm was NaN or Inf."""
    LOSS_SPIKE = "loss_spike"
    """The loss spiked, and the job asks to stop then."""
    NAN_WEIGHTS = "nan_weights"
    """The weights that were loaded hold NaN or Inf."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    """A checkpoint is incomplete or cannot be read."""
    WEIGHTS_DIFFER = "weights_differ"
    """A checkpoint belongs to another model."""
    PREPARE_FAILED = "prepare_failed"
    """The process that measures the model and the data failed."""
    UNKNOWN = "unknown"


class LauncherError(Exception):
    """Anything the launcher reports to its user without a traceback. `code` says what kind it is."""

    exit_status = 1
    code: FailureCode = FailureCode.UNKNOWN

    def __init__(self, *arguments: object, code: FailureCode | None = None) -> None:
        super().__init__(*arguments)
        if code is not None:
            self.code = code


@dataclass(frozen=True)
class Problem:
    """One thing to fix: where it stands, what was found, what would be right."""

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
    """A run that was started and did not finish."""


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
    """The code of an exception: its own for the launcher's errors, that of its errno for the system's, else unknown.

    What a library raised without an errno is unknown here; `launcher why` looks for a known text in its message.
    """
    if isinstance(error, LauncherError):
        return error.code
    if isinstance(error, MemoryError):
        return FailureCode.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO_CODES.get(error.errno, FailureCode.UNKNOWN)
    return FailureCode.UNKNOWN


def os_error_text(error: OSError) -> str:
    """The file that could not be used, if it is known, and why."""
    if error.strerror is None:
        return first_line(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])


def needs_no_traceback(error: BaseException) -> bool:
    """Whether an error is that of a full disk or of missing rights, which no traceback explains any better."""
    return isinstance(error, OSError) and code_of(error) in (FailureCode.DISK_FULL, FailureCode.PERMISSION)


def known_code(value: object) -> FailureCode | None:
    """The code that a file holds; None if it holds none, and unknown for one of a later version."""
    if value is None:
        return None
    try:
        return FailureCode(str(value))
    except ValueError:
        return FailureCode.UNKNOWN


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely meant, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None
