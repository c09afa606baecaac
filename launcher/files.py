"""Writes files atomically, appends and reads JSON lines, follows growing files, and publishes folders.

There is one reader of JSON lines. It skips and counts lines that a full disk, a lost node or a torn write damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
OnDamage = Callable[[bytes], None]

OutputMode = Literal["private", "group"]
FOLDER_MODES: dict[OutputMode, int] = {"private": 0o700, "group": 0o750}
_UMASKS: dict[OutputMode, int] = {"private": 0o077, "group": 0o027}
"""private: files of mode 0600 and folders of mode 0700, since a run contains private data. group: 0640 and 0750."""
_LOG_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\S+Z ?")


def keep_private() -> None:
    """Sets the umask: from now on, only the owner can read files and folders that this process creates."""
    use_output_mode("private")


def use_output_mode(mode: OutputMode) -> None:
    """Sets the umask: from now on, this process creates files and folders that only the owner, or its group too, reads.

    Folders inherit the setgid bit of the folder that they are in.
    """
    os.umask(_UMASKS[mode])


@contextlib.contextmanager
def output_mode(mode: OutputMode) -> Iterator[None]:
    """Uses the mode inside the block, in all threads of the process."""
    before = os.umask(_UMASKS[mode])
    try:
        yield
    finally:
        os.umask(before)


def share_files(folder: Path, mode: OutputMode) -> None:
    """Lets the group read the files of a folder under the mode `group`: some libraries create files of mode 0600."""
    if mode == "group":
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o040)


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def utc_now() -> str:
    """The current time in the format of `utc_text`."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """A time (seconds since the epoch) in the format of a run's files: UTC, ISO 8601, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_number(value: Any) -> Any:
    """NaN and Inf as text, since JSON does not have them; other values unchanged."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces `path` atomically, after the new content is on disk. The folder must exist.

    `durable=False` does not wait for the disk, for files that need not survive a power failure.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _naming(path), temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` atomically with `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Record | None:
    """The JSON object in a file; None if the file is missing, damaged or not an object. Raises PermissionError.

    On a network file system a file is stale for a moment when another host replaces it: then it is read once more.
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

    If an earlier write left the last line unfinished, that line is ended first. Raises OSError if the disk is full; the
    part written by then is a damaged line that readers skip.
    """
    line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
    with _naming(path), path.open("a+b", buffering=0) as file:
        write_whole(file.fileno(), line if _ends_with_newline(file.fileno()) else b"\n" + line)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that names no file: that of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_whole(descriptor: int, data: bytes) -> None:
    """Writes all of `data`: on a nearly full disk a write may be partial, and only the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _ends_with_newline(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def read_lines(path: Path, on_damage: OnDamage | None = None) -> Iterator[Record]:
    """The JSON objects of a file of JSON lines, in order; none if the file is missing.

    A last line without a newline is ignored: it may still be written. Any other line that is not a JSON object is
    skipped and passed to `on_damage`.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        yield from parse_lines((line for line in file if line.endswith(b"\n")), on_damage)


def parse_lines(lines: Iterable[bytes], on_damage: OnDamage | None = None) -> Iterator[Record]:
    """The lines that are JSON objects; other lines, except empty ones, are passed to `on_damage`."""
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


class Tail:
    """Reads the JSON lines that were appended to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def skip(self) -> None:
        """Skips the present content of the file."""
        self._position = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[Record]:
        """The complete new lines, without damaged ones; none if the file is missing. An unfinished line comes later."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._position += end
        return list(parse_lines(data[:end].split(b"\n")))


def last_lines(path: Path, count: int, max_bytes: int = 64 * 1024) -> list[str]:
    """The last `count` lines within the last `max_bytes` of a text file; none if it is missing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-count:]


def lines_backwards(path: Path, end: int | None = None, block_bytes: int = 64 * 1024) -> Iterator[bytes]:
    """The lines of a file from the last to the first, without newlines, read in blocks; none if it is missing.

    `end` is the position in bytes to start from, by default the end of the file.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END) if end is None else end
        rest, last = b"", True
        while position > 0:
            start = max(0, position - block_bytes)
            file.seek(start)
            rest, *lines = (file.read(position - start) + rest).split(b"\n")
            position = start
            if last and lines:
                # The newline at the end of the last line is not followed by an empty line.
                lines, last = lines if lines[-1] else lines[:-1], False
            yield from reversed(lines)
        if rest or not last:
            yield rest


def strip_times(lines: Iterable[str]) -> list[str]:
    """Log lines without their times."""
    return [_LOG_TIME.sub("", line) for line in lines]


def set_aside(path: Path, keep: Callable[[Record], bool]) -> Path | None:
    """Removes the records that `keep` rejects from a file of JSON lines; <stem>.undone-<k>.jsonl keeps the old file.

    Returns the path of the old file, or None if all records are kept. If the process dies in between, `path` has either
    its old or its new content, and no line is lost.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    # No process writes now: a complete last line without a newline counts, since the next append would end it.
    records = list(parse_lines(lines))
    kept = [record for record in records if keep(record)]
    if len(kept) == len(records):
        return None
    aside = _copied_aside(path)
    write_atomic(path, "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept))
    return aside


def _copied_aside(path: Path) -> Path:
    """Makes a hard link to the file at `path`, or a copy if the file system has no hard links; returns its path."""
    found = [(int(n), p) for p in path.parent.glob(f"{path.stem}.undone-*.jsonl") if (n := _number(p)).isdigit()]
    last, newest = max(found, default=(0, path))
    if newest != path and newest.read_bytes() == path.read_bytes():
        return newest  # from a process that died before it replaced `path`
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
    """Renames a finished folder to its final name; if another process was faster, ours is removed instead."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Renames a finished folder to its final name; an earlier folder of this name is removed afterwards."""
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
