"""One row per node: the status of the node and its ranks, as its agent last wrote it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.first_failure import Place
from launcher.run_dir import RunDir
from launcher.watch.run_session import Record, Session, int_of, number_of, read_json, seconds_of, text_of

STALE_SECONDS = 30.0
STRAGGLER_RATIO = 1.25
"""A node that takes more than this many times the median of all nodes is marked."""
_MIN_DIFFERENCE_SECONDS = 0.01
_FOLDER = re.compile(r"^node-(\d+)-(.+)$")


@dataclass(frozen=True)
class NodeStatus:
    """One node; None for an unknown value. A node that has not written anything yet has only its rank and host.

    `updates` is the number that all its ranks have completed. `step_seconds` is the median over its ranks of the time
    per update, `own_seconds` the longest time of a rank's own work in it, `rank_own_seconds` that time for each of
    `ranks`; `ratio` is the compared time divided by the median of all nodes. `slow_ranks` are the ranks of a straggler
    whose own work is slow. `heartbeat_seconds` is the age of its last report; above 30 it is `stale`.
    """

    node_rank: int
    host: str
    ranks: tuple[int, ...] = ()
    ranks_alive: int | None = None
    exit_codes: tuple[int, ...] = ()
    phase: str | None = None
    updates: int | None = None
    step_seconds: float | None = None
    own_seconds: float | None = None
    rank_own_seconds: tuple[float | None, ...] = ()
    ratio: float | None = None
    straggler: bool = False
    slow_ranks: tuple[int, ...] = ()
    cpus: int | None = None
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    gpu_percent: float | None = None
    gpu_memory_used_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None
    heartbeat_seconds: float | None = None
    stale: bool = False
    ended: bool | None = None


def read_node_statuses(run: RunDir, session: Session, now: float) -> list[NodeStatus]:
    """The run's present nodes, by node rank; the nodes with a log folder if no event names a node."""
    rows, newest = [], run.attempt()
    for (node_rank, host), offset in sorted(_clock_offsets(run, session).items()):
        record = read_json(run.node_file(node_rank, host))
        if record is not None and _is_older(record, newest, session, offset):
            record = None
        bare = NodeStatus(node_rank, host)
        rows.append(bare if record is None else _row(bare, record, offset, now))
    return rows


def rank_places(run: RunDir, session: Session) -> list[Place] | None:
    """Every rank with its node; None if a node has not reported its ranks yet."""
    places = []
    for node_rank, host in _clock_offsets(run, session):
        ranks = _ranks_in(read_json(run.node_file(node_rank, host)) or {})
        if not ranks:
            return None
        places += [Place(rank["rank"], node_rank, host) for rank in ranks]
    return places or None


def _clock_offsets(run: RunDir, session: Session) -> dict[tuple[int, str], float]:
    """The clock offset in seconds of each node (node rank, host)."""
    keys = session.nodes or [(int(m[1]), m[2]) for path in _folders(run.logs) if (m := _FOLDER.match(path.name))]
    return {key: session.offsets.get(run.node_logs(*key).name, 0.0) for key in keys}


def _folders(logs: Path) -> list[Path]:
    try:
        return list(logs.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_older(record: Record, newest_attempt: int, session: Session, offset: float) -> bool:
    """Whether a node's file is from an earlier attempt of the run. Older launchers did not write the attempt."""
    if (attempt := int_of(record.get("attempt"))) is not None:
        return attempt < newest_attempt
    time, placed = seconds_of(record.get("time")), session.placed_time
    return time is not None and placed is not None and time - offset < placed - STALE_SECONDS


def _row(bare: NodeStatus, record: Record, offset: float, now: float) -> NodeStatus:
    ranks = _ranks_in(record)
    time = seconds_of(record.get("time"))
    age = None if time is None else max(0.0, now - (time - offset))
    ended = bool(record.get("ended"))
    return replace(
        bare,
        ranks=tuple(rank["rank"] for rank in ranks),
        ranks_alive=sum(bool(rank.get("alive")) for rank in ranks),
        exit_codes=tuple(sorted({code for rank in ranks if (code := int_of(rank.get("exit_code")))})),
        phase=_common(text_of(rank.get("phase")) for rank in ranks),
        updates=min((count for rank in ranks if (count := int_of(rank.get("updates"))) is not None), default=None),
        step_seconds=_combined(statistics.median, ranks, "step_seconds"),
        own_seconds=_combined(max, ranks, "own_seconds"),
        rank_own_seconds=tuple(number_of(rank.get("own_seconds")) for rank in ranks),
        cpus=int_of(record.get("cpus")),
        cpu_percent=number_of(record.get("cpu_percent")),
        memory_used_bytes=int_of(record.get("memory_used_bytes")),
        memory_bytes=int_of(record.get("memory_bytes")),
        **_gpus(_records_in(record, "gpus")),
        heartbeat_seconds=age,
        stale=not ended and age is not None and age > STALE_SECONDS,
        ended=ended,
    )


def _ranks_in(record: Record) -> list[Record]:
    return [rank for rank in _records_in(record, "ranks") if int_of(rank.get("rank")) is not None]


def _records_in(record: Record, key: str) -> list[Record]:
    """The records in a list, without damaged ones."""
    found = record.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A node's number of GPUs, their mean utilization, and their total memory."""
    return {
        "gpus": len(gpus),
        "gpu_percent": _combined(statistics.fmean, gpus, "utilization_percent"),
        "gpu_memory_used_bytes": _combined(sum, gpus, "memory_used_bytes"),
        "gpu_memory_total_bytes": _combined(sum, gpus, "memory_bytes"),
    }


def _combined(combine: Any, items: Iterable[Mapping[str, Any]], key: str) -> Any:
    values = [value for item in items if (value := number_of(item.get(key))) is not None]
    return combine(values) if values else None


def _common(values: Iterable[Any]) -> str | None:
    """The value, or different values joined by a slash."""
    found = sorted({str(value) for value in values if value is not None})
    return "/".join(found) or None


def mark_stragglers(nodes: Sequence[NodeStatus]) -> tuple[str | None, list[NodeStatus]]:
    """(the name of the compared time, the nodes with their ratio to the median and stragglers marked).

    Ranks wait for each other in collectives, so the time per update is the same on all of them: if the time of their
    own work is known, that is compared. For an even number of nodes the lower median is used: with two nodes, a mean of
    both would include the slow one.
    """
    for key in ("own_seconds", "step_seconds"):
        values = [value for node in nodes if (value := getattr(node, key))]
        if len(values) >= 2:
            middle = statistics.median_low(values)
            compared = [_with_ratio(node, getattr(node, key), middle) for node in nodes]
            return key, [_with_slow_ranks(node, middle) for node in compared] if key == "own_seconds" else compared
    return None, list(nodes)


def _with_ratio(node: NodeStatus, value: float | None, middle: float) -> NodeStatus:
    if value is None:
        return node
    return replace(node, ratio=value / middle, straggler=_is_slow(value, middle))


def _with_slow_ranks(node: NodeStatus, middle: float) -> NodeStatus:
    times = zip(node.ranks, node.rank_own_seconds, strict=False)
    return replace(node, slow_ranks=tuple(rank for rank, time in times if time and _is_slow(time, middle)))


def _is_slow(seconds: float, middle: float) -> bool:
    return seconds > STRAGGLER_RATIO * middle and seconds - middle > _MIN_DIFFERENCE_SECONDS
