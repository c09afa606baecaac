"""The log files of a run, and which of them are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RequestError, nearest
from launcher.first_failure import Place
from launcher.run_dir import RunDir
from launcher.watch.nodes import places_of
from launcher.watch.session import Session

_FOLDER = re.compile(r"^node-(\d+)-(.+)$")
_RANK = re.compile(r"^rank-(\d+)$")


@dataclass(frozen=True)
class Source:
    """One log file. `offset_seconds` is how much its node's clock is ahead of the supervisor's."""

    path: Path
    node_rank: int
    host: str
    rank: int | None
    offset_seconds: float = 0.0

    @property
    def label(self) -> str:
        """As the file is named below logs/: node-0-h1/rank-3."""
        return f"{self.path.parent.name}/{self.path.stem}"


@dataclass(frozen=True)
class Choice:
    """Which files are asked for: of the node with this rank or host, and of this rank; None for all."""

    node: str | None = None
    rank: int | None = None

    def takes(self, source: Source) -> bool:
        node = self.node is None or self.node in (str(source.node_rank), source.host)
        return node and (self.rank is None or self.rank == source.rank)


def sources_of(run: RunDir, offsets: Mapping[str, float], choice: Choice = Choice()) -> list[Source]:
    """The chosen files that there are by now, in the order of nodes; a node's own files before those of its ranks."""
    found = [source for source in _all(run, offsets) if choice.takes(source)]
    return sorted(found, key=lambda s: (s.node_rank, s.host, -1 if s.rank is None else s.rank, s.path.name))


def check_choice(run: RunDir, choice: Choice) -> None:
    """Raises RequestError, with what there is, where no file of the run is the one asked for."""
    there = _all(run, {})
    if not there:
        prepare = run.logs / "prepare.log"
        hint = f"the data is, or was, being prepared: see {prepare}" if prepare.is_file() else None
        raise RequestError(Problem("no node has written a log yet", file=str(run.logs), hint=hint))
    _check(choice, there)


def check_expected(run: RunDir, session: Session, choice: Choice) -> None:
    """As `check_choice` for a run that may yet write the file asked for: once all its nodes have told their ranks."""
    places = places_of(run, session)
    if places is not None:
        _check(choice, [*_all(run, {}), *(_expected(run, place) for place in places)])


def _expected(run: RunDir, place: Place) -> Source:
    return Source(run.node_logs(place.node_rank, place.host) / "rank.log", place.node_rank, place.host, place.rank)


def _check(choice: Choice, there: Sequence[Source]) -> None:
    if not any(Choice(node=choice.node).takes(source) for source in there):
        assert choice.node is not None
        close = nearest(choice.node, {source.host for source in there})
        hint = f"did you mean {close}?" if close else f"there are {_listed(_nodes(there))}"
        raise RequestError(Problem(f"no node {choice.node!r} has logs here", key="--node", hint=hint))
    on_node = [source for source in there if Choice(node=choice.node).takes(source)]
    if not any(choice.takes(source) for source in on_node):
        ranks = _listed(str(rank) for rank in sorted({s.rank for s in on_node if s.rank is not None}))
        where = "" if choice.node is None else f" of node {choice.node}"
        found = f"no rank {choice.rank}{where} has a log here"
        raise RequestError(Problem(found, key="--rank", hint=f"there are ranks {ranks}"))


def _all(run: RunDir, offsets: Mapping[str, float]) -> list[Source]:
    try:
        folders = [(path, match) for path in run.logs.iterdir() if (match := _FOLDER.match(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        Source(path, int(match[1]), match[2], _rank(path), offsets.get(folder.name, 0.0))
        for folder, match in folders
        for path in folder.glob("*.log")
    ]


def _rank(path: Path) -> int | None:
    match = _RANK.match(path.stem)
    return int(match[1]) if match else None


def _nodes(sources: Iterable[Source]) -> list[str]:
    return [f"{rank} ({host})" for rank, host in sorted({(s.node_rank, s.host) for s in sources})]


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", … {len(names)} in all" if len(names) > most else "")
