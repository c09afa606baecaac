"""Log lines as text for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TextIO

from rich.console import Console

from launcher.watch.lines import STAMP_WIDTH, Line
from launcher.watch.sources import Source
from launcher.watch.terminal_safe import RESET, coloured, plain

_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
_AT_ONCE = 1000


class Printer:
    """Writes lines, each after the name of its file.

    To a terminal the name has its node's colour, and what a line would do to the terminal is taken out of it, save
    colours; elsewhere the text is as it was written.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        console = Console(file=out)
        self._terminal = console.is_terminal
        self._colours = console.is_terminal and console.color_system is not None and not console.no_color
        self._names: dict[int, str] = {}
        self._width = 0

    def print(self, lines: Iterable[Line], sources: Sequence[Source]) -> None:
        """Writes the lines; each one's `source` is its place in `sources`, which only ever grow."""
        self._learn(sources)
        lines = iter(lines)
        while chunk := list(islice(lines, _AT_ONCE)):
            self._out.write("".join(map(self._text, chunk)))
            self._out.flush()

    def _learn(self, sources: Sequence[Source]) -> None:
        if len(sources) == len(self._names):
            return
        self._width = max(self._width, *(len(source.label) for source in sources))
        for index, source in enumerate(sources):
            name = plain(source.label).ljust(self._width)
            colour = _COLOURS[source.node_rank % len(_COLOURS)]
            self._names[index] = f"\x1b[{colour}m{name}{RESET}" if self._colours else name

    def _text(self, line: Line) -> str:
        text = line.text
        if self._terminal:
            text = coloured(text) if self._colours else plain(text)
        return f"{self._names[line.source]} {line.stamp:{STAMP_WIDTH}} {text}\n"
