"""`launcher cache`: lists the entries of a cache folder, and removes those that no live run uses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from launcher.errors import Problem, RequestError
from launcher.job import load_job
from launcher.job.user_path import user_path
from launcher.prepare import cache_folder
from launcher.prepare.cache import Entry, cache_entries, clean
from launcher.watch.number_format import duration

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([mhdw])")


def cache_of(place: str | None, output_dir: Path) -> Path:
    """The cache folder that `place` names: itself, or a job file, whose cache it is. None: that of `output_dir`.

    Raises RequestError if it does not exist.
    """
    if place is None:
        folder, hint = output_dir / ".cache", "name a cache folder or a job file"
    else:
        folder, hint = user_path(place), "name the folder .cache of an output_dir, a data.cache_dir, or a job file"
    if folder.is_file():
        folder = cache_folder(load_job(folder).job)
    if not folder.is_dir():
        raise RequestError(Problem(f"cache folder not found: {folder}", hint=hint))
    return folder


def seconds_of(text: str) -> float:
    """The seconds in a duration such as 90m, 12h, 30d or 2w. Raises RequestError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        found = f"{text!r} is not a duration"
        raise RequestError(Problem(found, key="--older-than", hint="a number with m, h, d or w, such as 12h or 30d"))
    return float(match[1]) * _UNITS[match[2]]


def list_cache(cache: Path, as_json: bool) -> Table | Text | str:
    """The entries of a cache, as a table or as JSON."""
    entries = cache_entries(cache)
    if as_json:
        return json.dumps([entry.to_json() for entry in entries], indent=2)
    return _view(cache, entries)


def clean_cache(cache: Path, unused_seconds: float) -> list[str]:
    """Removes the entries that were not used for so long, and returns lines about them. Those in use are kept."""
    removed, kept = clean(cache, unused_seconds)
    lines = [f"removed  {_size(entry.bytes):>10}  {entry.kind:<10}  {entry.about}" for entry in removed]
    for entry in kept:
        why = "a live run uses it" if entry.in_use else "it was used within the last minute"
        lines.append(f"kept     {_size(entry.bytes):>10}  {entry.kind:<10}  {entry.about}: {why}")
    freed = sum(entry.bytes for entry in removed)
    entries = "1 entry" if len(removed) == 1 else f"{len(removed)} entries"
    return [*lines, f"removed {entries}, {_size(freed)}, from {cache}"]


def _view(cache: Path, entries: Sequence[Entry]) -> Table | Text:
    if not entries:
        return Text(f"the cache {cache} is empty")
    table = Table(
        box=None, pad_edge=False, show_edge=False, header_style="bold", title=str(cache), title_justify="left"
    )
    for column in ("entry", "kind", "size", "last used", "in use", "of"):
        table.add_column(column, justify="right" if column == "size" else "left", no_wrap=True)
    for entry in entries:
        ago = f"{duration(entry.unused_seconds)} ago"
        used = "yes" if entry.in_use else "no"
        table.add_row(entry.path.name, entry.kind, _size(entry.bytes), ago, used, entry.about)
    table.add_row("total", "", _size(sum(entry.bytes for entry in entries)), "", "", "")
    return table


def _size(count: int) -> str:
    """Bytes as text, in units of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
