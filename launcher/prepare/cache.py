"""The entries of a cache folder: tokenised data and converted models, what they take, and which may be removed.

A run marks the entries that it uses with a lock in the folder `uses` of the cache. An entry is in use while one of its
locks is held by a live process, on any host.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.files import read_json, write_json
from launcher.lock import heartbeat_age, hold, is_alive, read_holder

_DATA, _MODELS, _USES = "data", "models", "uses"
_CONVERTED = "gguf-"
_ABOUT, _USED = "about.json", "used"
_UNFINISHED, _REMOVED = ".partial", ".removed"
UNFINISHED_LOCK = "lock"
_ENTRY = re.compile(rf"{_DATA}/[0-9a-f]{{24}}|{_MODELS}/{_CONVERTED}[0-9a-f]{{24}}")
RECENT_SECONDS = 60.0
"""An entry that was used more recently is kept: the run that found it may not have marked it yet."""


@dataclass(frozen=True)
class Entry:
    """A folder of the cache. `unused_seconds`: since it was last used; `in_use`: by a live run."""

    path: Path
    kind: str
    about: str
    bytes: int
    unused_seconds: float
    in_use: bool

    def to_json(self) -> dict[str, object]:
        """The fields as JSON types."""
        return {**asdict(self), "path": str(self.path)}


def cache_entries(cache: Path) -> list[Entry]:
    """The entries of a cache folder, the one that was not used for the longest time first."""
    found = [entry for path in _folders(cache) if (entry := _entry(cache, path)) is not None]
    return sorted(found, key=lambda entry: -entry.unused_seconds)


def describe(entry: Path, about: str) -> None:
    """Notes what an entry was made of, for `launcher cache list`."""
    write_json(entry / _ABOUT, {"about": about})


@contextlib.contextmanager
def using(folders: Iterable[str]) -> Iterator[None]:
    """Marks the cache entries that contain `folders` as in use inside the block; other folders are passed over."""
    with contextlib.ExitStack() as stack:
        for entry in {entry for folder in folders if (entry := _entry_of(Path(folder))) is not None}:
            with contextlib.suppress(OSError):  # a cache that cannot be written cannot be cleaned by this user either
                # The cache is private, also if the run is for the group.
                for folder in (_uses(entry).parent, _uses(entry)):
                    folder.mkdir(mode=0o700, exist_ok=True)
                lock = _uses(entry) / f"{uuid.uuid4().hex}.lock"
                stack.callback(_end_use, lock)
                stack.enter_context(hold(lock))
                (_uses(entry) / _USED).touch(mode=0o600)
        yield


def _end_use(lock: Path) -> None:
    with contextlib.suppress(OSError):
        (lock.parent / _USED).touch(mode=0o600)
        lock.unlink(missing_ok=True)


def remove(cache: Path, entry: Entry) -> bool:
    """Removes an entry; False if it is in use, or was used within RECENT_SECONDS."""
    if entry.in_use or entry.unused_seconds < RECENT_SECONDS:
        return False
    removed = entry.path.with_name(f".{uuid.uuid4().hex[:8]}{_REMOVED}")
    try:
        entry.path.rename(removed)
    except FileNotFoundError:
        return False
    if _in_use(cache, entry.path):  # a run has marked it at this moment, and expects it here
        removed.rename(entry.path)
        return False
    shutil.rmtree(removed, ignore_errors=True)
    shutil.rmtree(_uses(entry.path), ignore_errors=True)
    return True


def clean(cache: Path, unused_seconds: float) -> tuple[list[Entry], list[Entry]]:
    """Removes the entries that were not used for `unused_seconds`. Returns (removed, kept because they are in use)."""
    _remove_leftovers(cache)
    old = [entry for entry in cache_entries(cache) if entry.unused_seconds >= unused_seconds]
    removed = [entry for entry in old if remove(cache, entry)]
    return removed, [entry for entry in old if entry not in removed]


def keep_below(cache: Path, limit_bytes: float, newest: Path) -> tuple[list[Entry], int]:
    """Removes entries, the one that was not used for the longest time first, until the cache takes at most the limit.

    `newest` is kept. Returns (removed, the bytes that the cache then takes).
    """
    _remove_leftovers(cache)
    entries = cache_entries(cache)
    total, removed = sum(entry.bytes for entry in entries), []
    for entry in entries:
        if total > limit_bytes and entry.path != newest and remove(cache, entry):
            removed.append(entry)
            total -= entry.bytes
    return removed, total


def _folders(cache: Path) -> Iterator[Path]:
    for name in (_DATA, _MODELS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from (path for path in (cache / name).iterdir() if path.is_dir() and not path.is_symlink())


def _entry(cache: Path, path: Path) -> Entry | None:
    """The entry in a folder; None if it is not one, or has just been removed."""
    if path.name.endswith(_REMOVED) or (path.parent.name == _MODELS and not path.name.startswith((".", _CONVERTED))):
        return None
    kind = "unfinished" if path.name.startswith(".") else "model" if path.parent.name == _MODELS else "data"
    try:
        unused = _unused_seconds(path, kind)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    except FileNotFoundError:
        return None
    return Entry(path, kind, _about(path, kind), size, unused, _in_use(cache, path))


def _unused_seconds(path: Path, kind: str) -> float:
    """Since an entry was used or written, by the file system's clock. Raises FileNotFoundError if it is gone."""
    unfinished = kind == "unfinished"
    written = filter(Path.is_file, path.rglob("*")) if unfinished else (path / "facts.json", path / "config.json")
    ages = [age for file in (_uses(path) / _USED, *written) if (age := heartbeat_age(file)) is not None]
    if not ages:
        raise FileNotFoundError(path)
    return min(ages)


def _about(path: Path, kind: str) -> str:
    found = read_json(path / _ABOUT)
    if found is not None and isinstance(found.get("about"), str):
        return str(found["about"])
    return {"model": "a model converted from a GGUF file", "unfinished": "tokenising that did not end"}.get(kind, "?")


def _entry_of(folder: Path) -> Path | None:
    """The cache entry that contains a folder of the plan; None if it is not in a cache."""
    entry = folder if folder.parent.name == _MODELS else folder.parent
    return entry if _ENTRY.fullmatch(f"{entry.parent.name}/{entry.name}") and entry.parent.is_dir() else None


def _uses(entry: Path) -> Path:
    return entry.parent.parent / _USES / entry.name


def _in_use(cache: Path, entry: Path) -> bool:
    """Whether a live process uses an entry, or tokenises into it."""
    locks = (cache / _USES / entry.name).glob("*.lock")
    return any(_is_held(lock) for lock in (*locks, entry / UNFINISHED_LOCK))


def _is_held(lock: Path) -> bool:
    holder = read_holder(lock)
    return holder is not None and is_alive(holder, lock)


def _remove_leftovers(cache: Path) -> None:
    """Removes what cleaning that was killed has left."""
    for path in _folders(cache):
        if path.name.endswith(_REMOVED):
            shutil.rmtree(path, ignore_errors=True)
