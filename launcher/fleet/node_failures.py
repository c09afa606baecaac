"""Failures of a node itself, such as a broken GPU or machine causes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.errors import FailureCode
from launcher.first_failure import lost_peer, was_terminated
from launcher.fleet.failures import Failure

OF_DEVICES = frozenset({FailureCode.NODE_UNFIT, FailureCode.NODE_FAULTY})
"""Codes of the check before a start for which a node is excluded from the run for good."""
_OF_MACHINES = frozenset({FailureCode.NODE_LOST, FailureCode.RANK_KILLED, FailureCode.RANK_CRASHED})
_FOLLOWS = frozenset({FailureCode.PEER_LOST, FailureCode.TIMEOUT, FailureCode.AGENT_LOST, FailureCode.ENDED})
_OF_DEVICES = re.compile(
    r"uncorrectable ECC|CUDA error|CUBLAS_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR)|GPU is lost"
    r"|fallen off the bus|unspecified launch failure|hardware stack error"
)
_OF_CODE = re.compile(r"out of memory|device-side assert")


def failed_nodes(failures: Sequence[Failure], hosts: Sequence[str]) -> dict[str, str]:
    """The hosts of an attempt that failed as broken machines do, each with how; `hosts` are all, by node rank.

    Empty if the first failure is of another kind, or if all nodes failed: then the machines are not the cause.
    """
    own = [each for each in failures if not _follows(each)]
    if not own or not _of_the_node(own[0]):
        return {}
    found: dict[str, str] = {}
    for each in filter(_of_the_node, own):
        rank = "" if each.rank is None else f"rank {each.rank}: "
        found.setdefault(hosts[each.node_rank], f"{rank}{each.error or each.how}".splitlines()[0])
    return {} if len(found) == len(set(hosts)) else found


def _of_the_node(failure: Failure) -> bool:
    if failure.code in _OF_MACHINES:
        return True
    text = failure.error or ""
    return bool(_OF_DEVICES.search(text)) and not _OF_CODE.search(text)


def _follows(failure: Failure) -> bool:
    """Whether the failure is the consequence of another one."""
    return failure.code in _FOLLOWS or lost_peer(failure) or (was_terminated(failure.exit_code) and not failure.error)
