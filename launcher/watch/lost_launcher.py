"""What is behind a run whose launcher vanished without a word, as far as its directory shows it."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.errors import FailureCode
from launcher.run_dir import RunDir
from launcher.watch.causes import Cause
from launcher.watch.nodes import NodeStatus
from launcher.watch.own_causes import CERTAIN
from launcher.watch.session import touched

_RAY_SECONDS = 35.0
"""Ray ends a process that has not reached its head for 60 seconds; agents end at once, and write every 5 seconds."""


def cause_of_loss(run: RunDir, nodes: Sequence[NodeStatus], now: float) -> Cause:
    """Ray, if the nodes' agents ended long before the launcher did; else whatever ends a process without a word."""
    return CERTAIN[FailureCode.RAY_LOST if _agents_ended_first(run, nodes, now) else FailureCode.SUPERVISOR_LOST]


def _agents_ended_first(run: RunDir, nodes: Sequence[NodeStatus], now: float) -> bool:
    beats = [now - node.heartbeat_seconds for node in nodes if node.heartbeat_seconds is not None and not node.ended]
    alive = touched(run)
    return bool(beats) and alive is not None and alive - max(beats) > _RAY_SECONDS
