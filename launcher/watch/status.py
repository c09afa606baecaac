"""The status of a run, read from its directory only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

from launcher.files import lines_backwards
from launcher.run_dir import ENDED, RunDir, utc_text
from launcher.watch.node_status import NodeStatus, mark_stragglers, read_node_statuses
from launcher.watch.run_session import (
    Record,
    Session,
    continued_by,
    int_of,
    is_locked,
    lock_touch_time,
    number_of,
    parsed,
    read_json,
    read_session,
    seconds_of,
    supervisor_ended,
    text_of,
)

LOST = "lost"
UNREADABLE = "unreadable"
LOST_SECONDS = 60.0
_RECENT_UPDATES = 20
_TIMED_UPDATES = 200


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. Times are in seconds; an unknown value is None.

    `state` is the state in state.json, "unknown" without one, or "lost": according to state.json (`written_state`) the
    run is alive, but no launcher holds its lock (on another host: and nothing was written for a minute); in a list of
    runs "unreadable" without read permission. `code` is the failure code of a run that failed or stopped itself.
    `updates` of `total_updates` are completed; `loss` and `lr` are from the last one, `tokens_per_second`,
    `step_seconds`, `tflops` (per rank) and `mfu` are medians of the last 20. `silent_seconds` is the time since
    anything was last written. `compared` names the time by which nodes are compared, "own_seconds" or "step_seconds".
    `excluded_nodes` are hosts that the run does not use any more, each with the reason. `continued_by`
    is the Slurm job that was submitted to continue the run after the time limit of the job `slurm_job_id`.
    """

    name: str
    path: str
    state: str
    written_state: str
    state_seconds: float | None = None
    reason: str | None = None
    code: str | None = None
    began: str | None = None
    host: str | None = None
    pid: int | None = None
    slurm_job_id: str | None = None
    ray_job_id: str | None = None
    continued_by: str | None = None
    updates: int = 0
    total_updates: int | None = None
    left_seconds: float | None = None
    loss: float | str | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    silent_seconds: float | None = None
    compared: str | None = None
    spare_nodes: tuple[str, ...] = ()
    excluded_nodes: dict[str, str] = field(default_factory=dict)
    nodes: tuple[NodeStatus, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the run has neither ended nor been lost."""
        return self.state == self.written_state and self.state not in (*ENDED, "unknown", UNREADABLE)


def read_status(run: RunDir, now: float) -> RunStatus:
    """The status at `now` (seconds since the epoch), with one row per node."""
    session = read_session(run)
    nodes = read_node_statuses(run, session, now)
    status = _status(run, session, nodes, now)
    compared, nodes = mark_stragglers(nodes if status.live else [replace(node, stale=False) for node in nodes])
    return replace(status, compared=compared, nodes=tuple(nodes))


def read_status_without_nodes(run: RunDir, now: float) -> RunStatus:
    """The status without its nodes; the node files of an ended run are not read."""
    session = read_session(run)
    return _status(run, session, [] if session.ended else read_node_statuses(run, session, now), now)


def read_status_for_list(run: RunDir, now: float) -> RunStatus:
    """As `read_status_without_nodes`, for a list of runs: "unreadable" instead of an error without read permission."""
    try:
        return read_status_without_nodes(run, now)
    except OSError:
        return RunStatus(run.path.name, str(run.path), UNREADABLE, UNREADABLE)


def _status(run: RunDir, session: Session, nodes: Sequence[NodeStatus], now: float) -> RunStatus:
    recent = recent_metrics(run)
    last = recent[-1] if recent else {}
    updates, total = _updates(last, nodes), total_updates(run)
    since = seconds_of(session.state.get("since"))
    active = _last_activity(run, session, last, nodes, now)
    lost = _is_lost(run, session, active, now)
    return RunStatus(
        name=run.path.name,
        path=str(run.path),
        state=LOST if lost else session.name,
        written_state=session.name,
        state_seconds=_age(active if lost else since, now),
        reason=_text(session.state.get("reason")),
        code=_text(session.state.get("code")),
        began=None if session.start_time is None else utc_text(session.start_time),
        host=text_of(session.state.get("host")),
        pid=int_of(session.state.get("pid")),
        slurm_job_id=_text(session.state.get("slurm_job_id")),
        ray_job_id=_text(session.state.get("ray_job_id")),
        continued_by=continued_by(run, session.state),
        updates=updates,
        total_updates=total,
        left_seconds=None if lost or session.ended else _remaining_seconds(recent, session.placed_time, updates, total),
        loss=_measured(last.get("loss")),
        lr=number_of(last.get("lr")),
        tokens_per_second=_median(recent[-_RECENT_UPDATES:], "tokens_per_second"),
        step_seconds=_median(recent[-_RECENT_UPDATES:], "step_seconds"),
        tflops=_median(recent[-_RECENT_UPDATES:], "tflops"),
        mfu=_median(recent[-_RECENT_UPDATES:], "mfu"),
        silent_seconds=_age(active, now),
        spare_nodes=session.spares,
        excluded_nodes=run.excluded_nodes(),
    )


def _updates(last: Record, nodes: Sequence[NodeStatus]) -> int:
    """Completed updates according to metrics.jsonl, or to the nodes if a user's script writes no metrics."""
    if (update := int_of(last.get("update"))) is not None:
        return update + 1
    return min((node.updates for node in nodes if node.updates is not None), default=0)


def recent_metrics(run: RunDir) -> list[Record]:
    """The last lines of metrics.jsonl, in order."""
    return list(parsed(islice(lines_backwards(run.metrics_file), _TIMED_UPDATES)))[::-1]


def total_updates(run: RunDir) -> int | None:
    """The number of updates in the newest plan; None if no plan can be read."""
    for file in (*reversed(run.plan_revisions()), run.plan_file):
        document = read_json(file)
        if document is not None:
            try:
                return int(document["plan"]["length"]["total_updates"])
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
    return None


def _remaining_seconds(recent: Sequence[Record], placed: float | None, updates: int, total: int | None) -> float | None:
    """Remaining time at the speed since the run was last placed, evaluations and checkpoints included."""
    timed = [(line, time) for line in recent if (time := seconds_of(line.get("time"))) and time >= (placed or 0.0)]
    if total is None or len(timed) < 2:
        return None
    # At least the update's own time: the clock may have been set back between two lines.
    gaps = [
        max(after - before, number_of(line.get("step_seconds")) or 0.0)
        for (_, before), (line, after) in pairwise(timed)
    ]
    return max(0, total - updates) * sum(gaps) / len(gaps)


def _last_activity(
    run: RunDir, session: Session, last: Record, nodes: Sequence[NodeStatus], now: float
) -> float | None:
    """When the run last wrote anything (seconds since the epoch): a heartbeat, an event, a state or a metrics line."""
    heartbeats = [now - node.heartbeat_seconds for node in nodes if node.heartbeat_seconds is not None]
    state_time, metrics_time = seconds_of(session.state.get("since")), seconds_of(last.get("time"))
    written = (lock_touch_time(run), session.last_event_time, state_time, metrics_time)
    return max([*heartbeats, *(time for time in written if time is not None)], default=None)


def _is_lost(run: RunDir, session: Session, active: float | None, now: float) -> bool:
    """Whether the supervisor ended without writing it. While data is prepared, only the lock shows this."""
    if session.ended or not session.state:
        return False
    if supervisor_ended(run, session.state):
        return True
    return active is not None and now - active >= LOST_SECONDS and is_locked(run) is False


def _age(time: float | None, now: float) -> float | None:
    return None if time is None else max(0.0, now - time)


def _median(lines: Sequence[Record], key: str) -> float | None:
    values = [value for line in lines if (value := number_of(line.get(key))) is not None]
    return statistics.median(values) if values else None


def _measured(value: Any) -> float | str | None:
    """A number, or the text of NaN or Inf; None for anything else."""
    return number_of(value) if number_of(value) is not None else text_of(value)


def _text(value: Any) -> str | None:
    return None if value is None else text_of(str(value))
