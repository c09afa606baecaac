"""What a node measured of its memory, and what that says of a rank that was killed there."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import FailureCode
from launcher.run_dir import RunDir
from launcher.watch.causes import KILLED_FOR_MEMORY, MEMORY_REFUSED, Cause, named
from launcher.watch.session import number_of, read_json, whole_of

_FULL, _LOW = 0.95, 0.8
_FIND_OUT = (
    "find out who ended it: the batch system's messages and limits (sacct -j JOB), the node's kernel log (dmesg), and "
    "whoever may end processes there. Continue with launcher resume"
)


@dataclass(frozen=True)
class NodeMemory:
    """A node's memory as its agent last wrote it.

    `share` is the part in use, of the largest of the last half minute; `oom_kills` counts the processes that the
    kernel killed for lack of memory since the ranks began. None stands for what is not known.
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
        """Whether there was room, and the kernel counted no kill."""
        return not self.killed and self.share is not None and self.share < _LOW


def memory_of(run: RunDir, node_rank: int, host: str) -> NodeMemory:
    """What node.json says of the node's memory."""
    record = read_json(run.node_file(node_rank, host)) or {}
    used, total = (number_of(record.get(key)) for key in ("memory_peak_bytes", "memory_bytes"))
    used = used or number_of(record.get("memory_used_bytes"))
    return NodeMemory(host, used / total if used and total else None, whole_of(record.get("oom_kills")))


def cause_of_kill(memory: NodeMemory) -> Cause:
    """What is behind a SIGKILL, as far as the node's memory shows it."""
    out_of_memory = named(KILLED_FOR_MEMORY)
    if memory.killed:
        return out_of_memory
    if memory.full:
        name = f"killed by signal KILL at {memory.share:.0%} memory used, so most likely for lack of memory"
        return Cause(name, out_of_memory.hint, FailureCode.OUT_OF_MEMORY)
    if memory.low:
        name = (
            f"killed by signal KILL at {memory.share:.0%} memory used, so most likely not for lack of memory but by an "
            "operator, a scheduler or a limit"
        )
        return Cause(name, _FIND_OUT, FailureCode.RANK_KILLED)
    name = "killed by signal KILL: by the kernel for lack of memory, or by an operator, a scheduler or a limit"
    return Cause(name, f"{_FIND_OUT}. If it was memory: {out_of_memory.hint}", FailureCode.RANK_KILLED)


def evidence_of_memory(memory: NodeMemory, cause: Cause | None) -> list[str]:
    """What the node measured, in a sentence; nothing if that says nothing about the cause.

    Where somebody else saw the kernel kill for lack of memory, a reading of free memory was taken too early or late.
    """
    if memory.killed:
        return [f"the kernel of {memory.host} killed {memory.oom_kills} of its processes for lack of memory (oom_kill)"]
    if memory.share is None or (cause == named(KILLED_FOR_MEMORY) and not memory.full):
        return []
    if cause == named(MEMORY_REFUSED) and memory.low:
        return [f"{_used(memory)}: so it was the size of the request, or a limit (ulimit -v, vm.overcommit_memory)"]
    counted = "; the kernel counted no kill for lack of memory" if memory.oom_kills == 0 else ""
    return [f"{_used(memory)}{', which is as good as full' if memory.full else ''}{counted}"]


def _used(memory: NodeMemory) -> str:
    return f"the memory of {memory.host} was at most {memory.share:.0%} used in the half minute before its last report"
