"""Prints log lines to a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TextIO

from rich.console import Console

from launcher.watch.log_files import LogFile
from launcher.watch.log_lines import STAMP_WIDTH, Line
from launcher.watch.terminal_safe import RESET, coloured, plain

_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
_CHUNK_LINES = 1000


class Printer:
    """Writes lines, each after the name of its file.

    On a terminal the name has its node's colour, and control sequences in the line are removed, except colours;
    elsewhere the line is unchanged.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        console = Console(file=out)
        self._terminal = console.is_terminal
        self._colours = console.is_terminal and console.color_system is not None and not console.no_color
        self._names: dict[int, str] = {}
        self._width = 0

    def print(self, lines: Iterable[Line], log_files: Sequence[LogFile]) -> None:
        """Writes the lines; a line's `file_index` is an index into `log_files`, to which files are only ever added."""
        self._add_names(log_files)
        lines = iter(lines)
        while chunk := list(islice(lines, _CHUNK_LINES)):
            self._out.write("".join(map(self._text, chunk)))
            self._out.flush()

    def _add_names(self, log_files: Sequence[LogFile]) -> None:
        if len(log_files) == len(self._names):
            return
        self._width = max(self._width, *(len(file.label) for file in log_files))
        for index, file in enumerate(log_files):
            name = plain(file.label).ljust(self._width)
            colour = _COLOURS[file.node_rank % len(_COLOURS)]
            self._names[index] = f"\x1b[{colour}m{name}{RESET}" if self._colours else name

    def _text(self, line: Line) -> str:
        text = line.text
        if self._terminal:
            text = coloured(text) if self._colours else plain(text)
        return f"{self._names[line.file_index]} {line.stamp:{STAMP_WIDTH}} {text}\n"
