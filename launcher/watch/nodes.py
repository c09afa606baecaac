"""A row a node: what the nodes' agents last wrote of themselves and their ranks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.first_failure import Place
from launcher.run_dir import RunDir
from launcher.watch.session import Record, Session, number_of, read_json, seconds_of, text_of, whole_of

STALE_SECONDS = 30.0
STRAGGLER_RATIO = 1.25
"""A node whose time is beyond this many times the median of all nodes is marked."""
_LEAST_SECONDS = 0.01
_FOLDER = re.compile(r"^node-(\d+)-(.+)$")


@dataclass(frozen=True)
class NodeStatus:
    """One node. None stands for what is not known: a node that has written nothing yet has its name alone.

    `updates` are those that all its ranks have done. `step_seconds` is the median over its ranks of the time of an
    update, `own_seconds` the longest of its ranks' own work in it, `rank_own_seconds` that of each of `ranks`; `ratio`
    is the one that is compared against the median of all nodes. `slow_ranks` are those of a straggler whose own work
    is what makes it one. `heartbeat_seconds` is the age of what it wrote last; beyond 30 it is `stale`.
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
    gpu_memory_bytes: int | None = None
    heartbeat_seconds: float | None = None
    stale: bool = False
    ended: bool | None = None


def node_statuses(run: RunDir, session: Session, now: float) -> list[NodeStatus]:
    """The nodes that the run has now, by node rank; those whose folders there are where no event names any."""
    rows = []
    for (node_rank, host), offset in sorted(_named(run, session).items()):
        record = read_json(run.node_file(node_rank, host))
        if record is not None and _is_older(record, session, offset):
            record = None
        bare = NodeStatus(node_rank, host)
        rows.append(bare if record is None else _row(bare, record, offset, now))
    return rows


def places_of(run: RunDir, session: Session) -> list[Place] | None:
    """Every rank and where it is; None while a node has not told of its ranks."""
    places = []
    for node_rank, host in _named(run, session):
        ranks = _ranks_in(read_json(run.node_file(node_rank, host)) or {})
        if not ranks:
            return None
        places += [Place(rank["rank"], node_rank, host) for rank in ranks]
    return places or None


def _named(run: RunDir, session: Session) -> dict[tuple[int, str], float]:
    """The nodes with the offsets of their clocks."""
    keys = session.nodes or [(int(m[1]), m[2]) for path in _folders(run.logs) if (m := _FOLDER.match(path.name))]
    return {key: session.offsets.get(run.node_logs(*key).name, 0.0) for key in keys}


def _folders(logs: Path) -> list[Path]:
    try:
        return list(logs.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_older(record: Record, session: Session, offset: float) -> bool:
    """Whether a node's file was left by an earlier session of the run."""
    time = seconds_of(record.get("time"))
    return time is not None and session.placed is not None and time - offset < session.placed - STALE_SECONDS


def _row(bare: NodeStatus, record: Record, offset: float, now: float) -> NodeStatus:
    ranks = _ranks_in(record)
    time = seconds_of(record.get("time"))
    age = None if time is None else max(0.0, now - (time - offset))
    ended = bool(record.get("ended"))
    return replace(
        bare,
        ranks=tuple(rank["rank"] for rank in ranks),
        ranks_alive=sum(bool(rank.get("alive")) for rank in ranks),
        exit_codes=tuple(sorted({code for rank in ranks if (code := whole_of(rank.get("exit_code")))})),
        phase=_common(text_of(rank.get("phase")) for rank in ranks),
        updates=min((made for rank in ranks if (made := whole_of(rank.get("updates"))) is not None), default=None),
        step_seconds=_of(statistics.median, ranks, "step_seconds"),
        own_seconds=_of(max, ranks, "own_seconds"),
        rank_own_seconds=tuple(number_of(rank.get("own_seconds")) for rank in ranks),
        cpus=whole_of(record.get("cpus")),
        cpu_percent=number_of(record.get("cpu_percent")),
        memory_used_bytes=whole_of(record.get("memory_used_bytes")),
        memory_bytes=whole_of(record.get("memory_bytes")),
        **_gpus(_records_in(record, "gpus")),
        heartbeat_seconds=age,
        stale=not ended and age is not None and age > STALE_SECONDS,
        ended=ended,
    )


def _ranks_in(record: Record) -> list[Record]:
    return [rank for rank in _records_in(record, "ranks") if whole_of(rank.get("rank")) is not None]


def _records_in(record: Record, key: str) -> list[Record]:
    """The records in a list; those that damage left as something else are left out."""
    found = record.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many GPUs a node has, the mean of their use, and their memory together."""
    return {
        "gpus": len(gpus),
        "gpu_percent": _of(statistics.fmean, gpus, "utilization_percent"),
        "gpu_memory_used_bytes": _of(sum, gpus, "memory_used_bytes"),
        "gpu_memory_bytes": _of(sum, gpus, "memory_bytes"),
    }


def _of(combine: Any, items: Iterable[Mapping[str, Any]], key: str) -> Any:
    values = [value for item in items if (value := number_of(item.get(key))) is not None]
    return combine(values) if values else None


def _common(values: Iterable[Any]) -> str | None:
    """The one value that all have; several are named together."""
    found = sorted({str(value) for value in values if value is not None})
    return "/".join(found) or None


def straggling(nodes: Sequence[NodeStatus]) -> tuple[str | None, list[NodeStatus]]:
    """(the time that was compared, the nodes with their ratio to the median, stragglers marked).

    Ranks wait for each other in an update's collectives, so that its time is the same on all of them: where the time of
    their own work is known, that is compared. Of an even number of nodes the lower median counts, so that the slow one
    of two is not half of its own measure.
    """
    for key in ("own_seconds", "step_seconds"):
        values = [value for node in nodes if (value := getattr(node, key))]
        if len(values) >= 2:
            middle = statistics.median_low(values)
            compared = [_against(node, getattr(node, key), middle) for node in nodes]
            return key, [_with_slow_ranks(node, middle) for node in compared] if key == "own_seconds" else compared
    return None, list(nodes)


def _against(node: NodeStatus, value: float | None, middle: float) -> NodeStatus:
    if value is None:
        return node
    return replace(node, ratio=value / middle, straggler=_is_slow(value, middle))


def _with_slow_ranks(node: NodeStatus, middle: float) -> NodeStatus:
    times = zip(node.ranks, node.rank_own_seconds, strict=False)
    return replace(node, slow_ranks=tuple(rank for rank, time in times if time and _is_slow(time, middle)))


def _is_slow(seconds: float, middle: float) -> bool:
    return seconds > STRAGGLER_RATIO * middle and seconds - middle > _LEAST_SECONDS
