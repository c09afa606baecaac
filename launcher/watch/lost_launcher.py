"""Why a run's launcher ended without writing a reason, as far as the run directory shows it."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.errors import FailureCode
from launcher.run_dir import RunDir
from launcher.watch.causes_by_code import CAUSE_BY_CODE
from launcher.watch.causes_by_message import Cause
from launcher.watch.node_status import NodeStatus
from launcher.watch.run_session import lock_touch_time

_RAY_SECONDS = 35.0
"""Ray ends a process that cannot reach its head for 60 seconds; agents end at once, and write every 5 seconds."""


def cause_of_loss(run: RunDir, nodes: Sequence[NodeStatus], now: float) -> Cause:
    """Ray, if the nodes' agents ended long before the launcher; else anything that kills a process."""
    return CAUSE_BY_CODE[FailureCode.RAY_LOST if _agents_ended_first(run, nodes, now) else FailureCode.SUPERVISOR_LOST]


def _agents_ended_first(run: RunDir, nodes: Sequence[NodeStatus], now: float) -> bool:
    heartbeats = [
        now - node.heartbeat_seconds for node in nodes if node.heartbeat_seconds is not None and not node.ended
    ]
    launcher_beat = lock_touch_time(run)
    return bool(heartbeats) and launcher_beat is not None and launcher_beat - max(heartbeats) > _RAY_SECONDS
