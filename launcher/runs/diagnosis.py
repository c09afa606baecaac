"""Which ranks and nodes failed in an attempt, in which order, and the message that names the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import FailureCode
from launcher.files import last_lines, strip_times
from launcher.first_failure import (
    LOG_LINES,
    Place,
    code_of_collective,
    error_in_log,
    only_timeouts,
    timeout_headline,
    traceback_time,
)
from launcher.fleet.failures import Failure, all_failures, sort_failures
from launcher.fleet.hang_detector import Hang
from launcher.fleet.nodes import Nodes
from launcher.fleet.stacks import Difference, RankStack, differing_ranks
from launcher.records import Report
from launcher.run_dir import RunDir, rank_log_name
from launcher.watch.causes_by_message import find_cause
from launcher.watch.memory_evidence import memory_of

_MESSAGE_LINES = 20


class Diagnosis:
    """Finds the failures of an attempt on `nodes`, from reports, logs and stacks."""

    def __init__(self, run: RunDir, processes_per_node: int, nodes: Nodes) -> None:
        self.attempt = 1
        self._run, self._processes, self._nodes = run, processes_per_node, nodes
        self._logged: dict[int, Failure] = {}

    def of_reports(self, reports: Sequence[Report], hung: Sequence[Failure]) -> list[Failure]:
        """The failures in the ranks' reports together with those of a hang, the first one at the start."""
        found = all_failures(reports, [node.clock_offset_seconds for node in self._nodes.nodes])
        return [_with_code(failure) for failure in sort_failures([*map(self._with_log, found), *hung])]

    def of_hang(self, hang: Hang, stacks: list[RankStack] | None, absent: Sequence[int], now: float) -> list[Failure]:
        """A failure of each rank whose stack differs from the others, or one failure without a rank.

        `stacks` is None if they could not be read; `absent` are the node ranks whose agent did not answer.
        """
        difference = Difference((), "the stacks could not be read")
        if stacks is not None:
            difference = differing_ranks(stacks, self._rank_name)
        parts = [str(hang), *(f"the agent of node {node} did not answer" for node in absent), difference.text]
        places: list[tuple[int | None, int]] = [(rank, rank // self._processes) for rank in difference.ranks]
        text = "; ".join(parts)
        unknown = (None, absent[0] if absent else 0)
        return [Failure(rank, node, now, "a hang", text, code=FailureCode.HUNG) for rank, node in places or [unknown]]

    def with_oom_kill(self, failure: Failure) -> Failure:
        """The failure with its cause if the kernel killed the rank for lack of memory."""
        if failure.code is not FailureCode.RANK_KILLED or failure.error:
            return failure
        if not memory_of(self._run, failure.node_rank, self._nodes.nodes[failure.node_rank].host).killed:
            return failure
        how = f"{failure.how}, from the kernel for lack of memory"
        return replace(failure, how=how, code=FailureCode.OUT_OF_MEMORY)

    def message(self, failures: Sequence[Failure]) -> str:
        """Names the first failure, with the end of its rank's log."""
        failure = failures[0]
        if failure.code is FailureCode.HUNG:
            return f"the run hung: {failure.error}"
        node = f"node {failure.node_rank} ({self._nodes.nodes[failure.node_rank].host})"
        if failure.rank is None:
            return f"{node} is lost: {failure.how}"
        if only_timeouts(failures):
            head = timeout_headline(self._absent(failures))
        else:
            head = f"rank {failure.rank} on {node} failed first, with {failure.how}"
            head += f": {failure.error}" if failure.error else ""
        if failure.code is FailureCode.DISK_FULL:
            return head
        log = self._log_of(failure.rank, failure.node_rank)
        tail = "\n".join(f"    {line}" for line in last_lines(log, _MESSAGE_LINES))
        return f"{head}\n  the end of {log}:\n{tail}"

    def _with_log(self, failure: Failure) -> Failure:
        """The failure with the error from the rank's log if the rank reported none: a script, or a crash in C++."""
        rank = failure.rank
        if rank is None or failure.error:
            return failure
        if rank not in self._logged:
            lines = last_lines(self._log_of(rank, failure.node_rank), LOG_LINES)
            error, traceback = error_in_log(strip_times(lines), failure.exit_code)
            raised = traceback_time(lines, failure.exit_code)
            ahead = self._nodes.nodes[failure.node_rank].clock_offset_seconds
            time = failure.time if raised is None else min(failure.time, round(raised - ahead, 3))
            self._logged[rank] = replace(failure, error=error, traceback=traceback, time=time)
        return self._logged[rank]

    def _absent(self, failures: Sequence[Failure]) -> list[Place]:
        """The ranks that did not fail."""
        failed, size = {failure.rank for failure in failures}, len(self._nodes.nodes) * self._processes
        nodes = [(rank, rank // self._processes) for rank in range(size) if rank not in failed]
        return [Place(rank, node, self._nodes.nodes[node].host) for rank, node in nodes]

    def _rank_name(self, rank: int) -> str:
        node = rank // self._processes
        return f"rank {rank} on node {node} ({self._nodes.nodes[node].host})"

    def _log_of(self, rank: int, node_rank: int) -> Path:
        return self._run.node_logs(node_rank, self._nodes.nodes[node_rank].host) / rank_log_name(rank, self.attempt)


def _with_code(failure: Failure) -> Failure:
    """The failure with the code of a failed collective or of a known message, if no other code is known."""
    if failure.code is not FailureCode.UNKNOWN:
        return failure
    code = code_of_collective(failure)
    if code is FailureCode.UNKNOWN and (cause := find_cause(failure.error)):
        code = cause.code
    return replace(failure, code=code)
