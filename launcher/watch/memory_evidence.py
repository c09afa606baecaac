"""The memory that a node measured, as evidence of why a rank was killed there."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import FailureCode
from launcher.run_dir import RunDir
from launcher.watch.causes_by_message import ALLOCATION_FAILED, KILLED_FOR_MEMORY, Cause, cause_named
from launcher.watch.run_session import int_of, number_of, read_json

_FULL, _LOW = 0.95, 0.8
_FIND_OUT = (
    "find out what killed it: check the batch system's messages and limits (sacct -j JOB), the node's kernel log "
    "(dmesg), and who can end processes there. Continue with launcher resume"
)


@dataclass(frozen=True)
class NodeMemory:
    """A node's memory as its agent last wrote it; None for an unknown value.

    `share` is the largest share in use in the last half minute; `oom_kills` counts the processes that the kernel killed
    for lack of memory since the ranks started.
    """

    host: str
    share: float | None = None
    oom_kills: int | None = None

    @property
    def killed(self) -> bool:
        return bool(self.oom_kills)

    @property
    def full(self) -> bool:
        return self.share is not None and self.share >= _FULL

    @property
    def low(self) -> bool:
        """Whether memory was free, and the kernel killed no process."""
        return not self.killed and self.share is not None and self.share < _LOW


def memory_of(run: RunDir, node_rank: int, host: str) -> NodeMemory:
    """The node's memory in node.json."""
    record = read_json(run.node_file(node_rank, host)) or {}
    used, total = (number_of(record.get(key)) for key in ("memory_peak_bytes", "memory_bytes"))
    used = used or number_of(record.get("memory_used_bytes"))
    return NodeMemory(host, used / total if used and total else None, int_of(record.get("oom_kills")))


def cause_of_kill(memory: NodeMemory) -> Cause:
    """The cause of a SIGKILL, as far as the node's memory shows it."""
    out_of_memory = cause_named(KILLED_FOR_MEMORY)
    if memory.killed:
        return out_of_memory
    if memory.full:
        name = f"killed by SIGKILL with {memory.share:.0%} of memory used: most likely for lack of memory"
        return Cause(name, out_of_memory.hint, FailureCode.OUT_OF_MEMORY)
    if memory.low:
        name = (
            f"killed by SIGKILL with {memory.share:.0%} of memory used: most likely not for lack of memory but by an "
            "operator, a scheduler or a limit"
        )
        return Cause(name, _FIND_OUT, FailureCode.RANK_KILLED)
    name = "killed by SIGKILL: from the kernel for lack of memory, or from an operator, a scheduler or a limit"
    return Cause(name, f"{_FIND_OUT}. If memory ran out: {out_of_memory.hint}", FailureCode.RANK_KILLED)


def evidence_of_memory(memory: NodeMemory, cause: Cause | None) -> list[str]:
    """What the node measured, as a sentence; empty if it is not related to the cause.

    If another program reports an out-of-memory kill, a measurement of free memory was taken too early or too late.
    """
    if memory.killed:
        return [f"the kernel of {memory.host} killed {memory.oom_kills} of its processes for lack of memory (oom_kill)"]
    if memory.share is None or (cause == cause_named(KILLED_FOR_MEMORY) and not memory.full):
        return []
    if cause == cause_named(ALLOCATION_FAILED) and memory.low:
        return [f"{_used(memory)}: the allocation was too large, or hit a limit (ulimit -v, vm.overcommit_memory)"]
    counted = "; the kernel killed no process for lack of memory" if memory.oom_kills == 0 else ""
    return [f"{_used(memory)}{': it was nearly full' if memory.full else ''}{counted}"]


def _used(memory: NodeMemory) -> str:
    return f"{memory.host} used at most {memory.share:.0%} of its memory in the half minute before its last report"
