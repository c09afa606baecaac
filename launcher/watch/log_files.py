"""The log files of a run, and the selection of some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RequestError, nearest
from launcher.first_failure import Place
from launcher.run_dir import RunDir
from launcher.watch.node_status import rank_places
from launcher.watch.run_session import Session

_FOLDER = re.compile(r"^node-(\d+)-(.+)$")
_RANK = re.compile(r"^rank-(\d+)(?:\.attempt-\d+)?$")


@dataclass(frozen=True)
class LogFile:
    """One log file. `offset_seconds` is how far its node's clock is ahead of the supervisor's."""

    path: Path
    node_rank: int
    host: str
    rank: int | None
    offset_seconds: float = 0.0

    @property
    def label(self) -> str:
        """The file's name below logs/: node-0-h1/rank-3."""
        return f"{self.path.parent.name}/{self.path.stem}"


@dataclass(frozen=True)
class LogSelection:
    """A selection of files: of the node with this node rank or host, and of this rank; None for all."""

    node: str | None = None
    rank: int | None = None

    def matches(self, file: LogFile) -> bool:
        node = self.node is None or self.node in (str(file.node_rank), file.host)
        return node and (self.rank is None or self.rank == file.rank)


def log_files_of(run: RunDir, offsets: Mapping[str, float], selection: LogSelection = LogSelection()) -> list[LogFile]:
    """The selected files that exist, by node; a node's own files before those of its ranks."""
    found = [file for file in _all(run, offsets) if selection.matches(file)]
    return sorted(found, key=lambda f: (f.node_rank, f.host, -1 if f.rank is None else f.rank, f.path.name))


def check_selection(run: RunDir, selection: LogSelection) -> None:
    """Raises RequestError, naming the existing files, if the selection matches none of the run."""
    existing = _all(run, {})
    if not existing:
        prepare = run.logs / "prepare.log"
        hint = f"the log of the data preparation is {prepare}" if prepare.is_file() else None
        raise RequestError(Problem("no node has written a log yet", file=str(run.logs), hint=hint))
    _check(selection, existing)


def check_live_selection(run: RunDir, session: Session, selection: LogSelection) -> None:
    """As `check_selection` for a live run: raises only once all nodes have reported their ranks."""
    places = rank_places(run, session)
    if places is not None:
        _check(selection, [*_all(run, {}), *(_expected(run, place) for place in places)])


def _expected(run: RunDir, place: Place) -> LogFile:
    return LogFile(run.node_logs(place.node_rank, place.host) / "rank.log", place.node_rank, place.host, place.rank)


def _check(selection: LogSelection, files: Sequence[LogFile]) -> None:
    on_node = [file for file in files if LogSelection(node=selection.node).matches(file)]
    if not on_node:
        assert selection.node is not None
        close = nearest(selection.node, {file.host for file in files})
        hint = f"did you mean {close}?" if close else f"the run has logs of nodes {_listed(_nodes(files))}"
        raise RequestError(Problem(f"node {selection.node!r} has no logs in this run", key="--node", hint=hint))
    if not any(selection.matches(file) for file in on_node):
        ranks = _listed(str(rank) for rank in sorted({file.rank for file in on_node if file.rank is not None}))
        of_node = "" if selection.node is None else f" of node {selection.node}"
        found = f"rank {selection.rank}{of_node} has no log in this run"
        raise RequestError(Problem(found, key="--rank", hint=f"the run has logs of ranks {ranks}"))


def _all(run: RunDir, offsets: Mapping[str, float]) -> list[LogFile]:
    try:
        folders = [(path, match) for path in run.logs.iterdir() if (match := _FOLDER.match(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        LogFile(path, int(match[1]), match[2], _rank(path), offsets.get(folder.name, 0.0))
        for folder, match in folders
        for path in folder.glob("*.log")
    ]


def _rank(path: Path) -> int | None:
    match = _RANK.match(path.stem)
    return int(match[1]) if match else None


def _nodes(files: Iterable[LogFile]) -> list[str]:
    return [f"{rank} ({host})" for rank, host in sorted({(file.node_rank, file.host) for file in files})]


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", … {len(names)} in all" if len(names) > most else "")
