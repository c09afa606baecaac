"""How files are written and read: replaced atomically, grown by whole lines, read whatever happened to them.

There is one reader of JSON lines. It skips what a full disk, a lost node or a torn write left damaged, and counts it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OnDamage = Callable[[bytes], None]

PRIVATE_UMASK = 0o077
"""Files of mode 0600 and folders of mode 0700: a run holds people's data."""


def keep_private() -> None:
    """Makes every file and folder that this process creates from here on readable by its owner alone."""
    os.umask(PRIVATE_UMASK)


def utc_now() -> str:
    """The current time in the form of `utc_text`."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """A time (seconds since the epoch) as every file of a run writes it: UTC, ISO 8601, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text. Other values are returned unchanged."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces `path` in one step; the new content is on disk before the old file is gone. The folder must exist.

    `durable=False` skips the wait for the disk, for files that need not survive a power cut.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, replaced atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Record | None:
    """A JSON object; None if the file is missing, damaged or holds something else. Raises PermissionError.

    A file that another host replaces may be stale for a moment on a network file system, so it is read once more.
    """
    for _ in range(2):
        try:
            return _parsed(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise
        except OSError:
            continue
    return None


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Appends one JSON line in a single write.

    It starts on a line of its own: a last line that an earlier write left unfinished is ended first. Raises OSError if
    the disk is full; what was written by then is a damaged line that readers skip.
    """
    line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
    with path.open("a+b", buffering=0) as file:
        write_whole(file.fileno(), line if _ends_with_newline(file.fileno()) else b"\n" + line)


def write_whole(descriptor: int, data: bytes) -> None:
    """Writes all of `data`: a disk that is nearly full takes a part of it, and only the next write fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _ends_with_newline(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def read_lines(path: Path, on_damage: OnDamage | None = None) -> Iterator[Record]:
    """The JSON objects of a file of JSON lines, in order; none if the file is missing.

    A last line without its end is left for later: its writer may be at work. Every other line that is not a JSON
    object is skipped and given to `on_damage`.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        yield from parse_lines((line for line in file if line.endswith(b"\n")), on_damage)


def parse_lines(lines: Iterable[bytes], on_damage: OnDamage | None = None) -> Iterator[Record]:
    """Those of the lines that are JSON objects; the others are given to `on_damage`, except empty ones."""
    for line in lines:
        record = _parsed(line)
        if record is not None:
            yield record
        elif on_damage is not None and line.strip():
            on_damage(line)


def _parsed(text: bytes) -> Record | None:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def set_aside(path: Path, keep: Callable[[Record], bool]) -> Path | None:
    """Leaves in a file of JSON lines the records that `keep` accepts; None if that is all of them.

    Otherwise the file as it was gets the name <stem>.undone-<k>.jsonl, which is returned. If the process dies in
    between, `path` is whole, either as it was or as it should be, and no line is lost.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    # Nobody writes now: a whole last line that lacks its end counts, since the next append would complete it.
    records = list(parse_lines(lines))
    kept = [record for record in records if keep(record)]
    if len(kept) == len(records):
        return None
    aside = _copied_aside(path)
    write_atomic(path, "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept))
    return aside


def _copied_aside(path: Path) -> Path:
    """A second name for the file at `path`, or a copy of it where the file system has no hard links."""
    found = [(int(n), p) for p in path.parent.glob(f"{path.stem}.undone-*.jsonl") if (n := _number(p)).isdigit()]
    last, newest = max(found, default=(0, path))
    if newest != path and newest.read_bytes() == path.read_bytes():
        return newest  # left by a process that died before it replaced `path`
    aside = path.with_name(f"{path.stem}.undone-{last + 1}.jsonl")
    try:
        os.link(path, aside)
    except FileExistsError:
        raise
    except OSError:
        write_atomic(aside, path.read_bytes())
    return aside


def _number(undone: Path) -> str:
    return undone.stem.rpartition("-")[2]


def publish_folder(temporary: Path, folder: Path) -> None:
    """Renames a finished folder to its name; if another process was faster, its folder stays and ours is removed."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Renames a finished folder to its name, in place of an earlier one, which is removed only afterwards."""
    earlier = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(earlier)
    try:
        temporary.rename(folder)
    except OSError:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
