"""Where a run stands, read from its directory alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from launcher.run_dir import ENDED, RunDir, utc_text
from launcher.tail import lines_backwards
from launcher.watch.nodes import NodeStatus, node_statuses, straggling
from launcher.watch.session import (
    Record,
    Session,
    is_held,
    number_of,
    parsed,
    read_json,
    read_session,
    seconds_of,
    supervisor_gone,
    text_of,
    touched,
    whole_of,
)

LOST = "lost"
UNREADABLE = "unreadable"
LOST_SECONDS = 60.0
_RECENT_UPDATES = 20
_TIMED_UPDATES = 200


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. Times are seconds; None stands for what is not known.

    `state` is that of state.json, "unknown" without one, or "lost": state.json (`written_state`) says that the run is
    alive, but no launcher holds its directory (seen from another host: for a minute); in a list "unreadable" if it may
    not be read. `code` is that of a failed run, or of one that stopped itself. `updates` are done, of `total_updates`;
    `loss` and `lr` are the last one's, `tokens_per_second` and `step_seconds` medians of the last 20. `compared` names
    the time in which nodes are compared, "own_seconds" or "step_seconds".
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
    updates: int = 0
    total_updates: int | None = None
    left_seconds: float | None = None
    loss: float | str | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    silent_seconds: float | None = None
    compared: str | None = None
    nodes: tuple[NodeStatus, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the run goes on."""
        return self.state == self.written_state and self.state not in (*ENDED, "unknown", UNREADABLE)


def read_status(run: RunDir, now: float) -> RunStatus:
    """The status at `now` (seconds since the epoch), with a row a node."""
    session = read_session(run)
    nodes = node_statuses(run, session, now)
    status = _status(run, session, nodes, now)
    compared, nodes = straggling(nodes if status.live else [replace(node, stale=False) for node in nodes])
    return replace(status, compared=compared, nodes=tuple(nodes))


def read_brief(run: RunDir, now: float) -> RunStatus:
    """The status without its nodes; those of a run that has ended are not even read."""
    session = read_session(run)
    return _status(run, session, [] if session.ended else node_statuses(run, session, now), now)


def read_listed(run: RunDir, now: float) -> RunStatus:
    """As `read_brief`, for a list of runs, of which one that may not be read must not hide the others."""
    try:
        return read_brief(run, now)
    except OSError:
        return RunStatus(run.path.name, str(run.path), UNREADABLE, UNREADABLE)


def _status(run: RunDir, session: Session, nodes: Sequence[NodeStatus], now: float) -> RunStatus:
    recent = recent_metrics(run)
    last = recent[-1] if recent else {}
    updates, total = _updates(last, nodes), total_updates(run)
    since = seconds_of(session.state.get("since"))
    heard = _heard(run, session, last, nodes, now)
    lost = _is_lost(run, session, heard, now)
    return RunStatus(
        name=run.path.name,
        path=str(run.path),
        state=LOST if lost else session.name,
        written_state=session.name,
        state_seconds=_age(heard if lost else since, now),
        reason=_text(session.state.get("reason")),
        code=_text(session.state.get("code")),
        began=None if session.began is None else utc_text(session.began),
        host=text_of(session.state.get("host")),
        pid=whole_of(session.state.get("pid")),
        slurm_job_id=_text(session.state.get("slurm_job_id")),
        ray_job_id=_text(session.state.get("ray_job_id")),
        updates=updates,
        total_updates=total,
        left_seconds=None if lost or session.ended else _left(recent, session.placed, updates, total),
        loss=_measured(last.get("loss")),
        lr=number_of(last.get("lr")),
        tokens_per_second=_median(recent[-_RECENT_UPDATES:], "tokens_per_second"),
        step_seconds=_median(recent[-_RECENT_UPDATES:], "step_seconds"),
        silent_seconds=_age(heard, now),
    )


def _updates(last: Record, nodes: Sequence[NodeStatus]) -> int:
    """Updates done: what metrics.jsonl says, or the nodes where a script of the user's own writes none."""
    if (update := whole_of(last.get("update"))) is not None:
        return update + 1
    return min((node.updates for node in nodes if node.updates is not None), default=0)


def recent_metrics(run: RunDir) -> list[Record]:
    """The last lines of metrics.jsonl, in their order."""
    return list(parsed(islice(lines_backwards(run.metrics_file), _TIMED_UPDATES)))[::-1]


def total_updates(run: RunDir) -> int | None:
    """How many updates the newest plan has."""
    for file in (*reversed(run.plan_revisions()), run.plan_file):
        document = read_json(file)
        if document is not None:
            try:
                return int(document["plan"]["length"]["total_updates"])
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
    return None


def _left(recent: Sequence[Record], placed: float | None, updates: int, total: int | None) -> float | None:
    """Time left at the pace since the run was last placed, with what it spent on evaluations and checkpoints."""
    times = [time for line in recent if (time := seconds_of(line.get("time"))) and time >= (placed or 0.0)]
    if total is None or len(times) < 2:
        return None
    return max(0, total - updates) * (times[-1] - times[0]) / (len(times) - 1)


def _heard(run: RunDir, session: Session, last: Record, nodes: Sequence[NodeStatus], now: float) -> float | None:
    """When anything of the run was last heard."""
    beats = [now - node.heartbeat_seconds for node in nodes if node.heartbeat_seconds is not None]
    told = (touched(run), session.heard, seconds_of(session.state.get("since")), seconds_of(last.get("time")))
    return max([*beats, *(time for time in told if time is not None)], default=None)


def _is_lost(run: RunDir, session: Session, heard: float | None, now: float) -> bool:
    """Did the supervisor vanish? While data is prepared nothing is written, and the lock alone shows it."""
    if session.ended or not session.state:
        return False
    if supervisor_gone(run, session.state):
        return True
    return heard is not None and now - heard >= LOST_SECONDS and is_held(run) is False


def _age(time: float | None, now: float) -> float | None:
    return None if time is None else max(0.0, now - time)


def _median(lines: Sequence[Record], key: str) -> float | None:
    values = [value for line in lines if (value := number_of(line.get(key))) is not None]
    return statistics.median(values) if values else None


def _measured(value: Any) -> float | str | None:
    """A number, or what stands for NaN and infinity; None for anything else."""
    return number_of(value) if number_of(value) is not None else text_of(value)


def _text(value: Any) -> str | None:
    return None if value is None else text_of(str(value))
