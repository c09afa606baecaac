"""Plots learning-rate curves with characters, for a terminal, a pipe or a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from launcher.lr_report.curves import Curve

COLOURS = ("cyan", "orange", "green", "magenta", "red", "blue")
MARKS = ("braille", "o", "x", "+", "*", "#")
RICH_COLOURS = ("cyan", "bright_yellow", "green", "magenta", "red", "blue")
POINTS_PER_COLUMN = 4


def plot_text(curves: Sequence[Curve], width: int = 80, height: int = 16, colour: bool = False) -> Text:
    """The curves over the updates, `width` columns wide, with a legend if there are several.

    Without colour, curves differ in the characters that draw them.
    """
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    # Later curves cover earlier ones: draw the main curve, which is the first, last.
    for number in reversed(range(len(curves))):
        figure.draw(_signal(plotext, curves[number], number, width, colour))
    _axes(figure, curves)
    lines = str(figure.build().string(colorless=not colour)).rstrip("\n")
    text = Text.from_ansi(lines, no_wrap=True)
    return Text("\n").join((_legend(curves, colour), text)) if len(curves) > 1 else text


def _signal(plotext: Any, curve: Curve, number: int, width: int, colour: bool) -> Any:
    updates, lrs = downsample(curve, width * POINTS_PER_COLUMN)
    pixel = COLOURS[number % len(COLOURS)] if colour else None
    mark = "braille" if colour else MARKS[number % len(MARKS)]
    signal = plotext.figure.signal(updates, lrs, marker=plotext.marker(mark, pixel))
    if colour or number == 0:
        signal.lines()
    return signal


def downsample(curve: Curve, most: int) -> tuple[list[int], list[float]]:
    """At most about `most` points of a curve: the lowest and highest of each stretch, to keep all peaks."""
    count = len(curve.lrs)
    stretches = max(1, min(count, most // 2))
    edges = [stretch * count // stretches for stretch in range(stretches + 1)]
    kept = {0, count - 1}
    for start, end in pairwise(edges):
        stretch = range(start, end)
        kept |= {min(stretch, key=curve.lrs.__getitem__), max(stretch, key=curve.lrs.__getitem__)}
    chosen = sorted(kept)
    return [curve.updates[i] for i in chosen], [curve.lrs[i] for i in chosen]


def _axes(figure: Any, curves: Sequence[Curve]) -> None:
    """The axes: learning rate from 0, and updates."""
    last = max(curve.updates[-1] for curve in curves)
    top = max(max(curve.lrs) for curve in curves) or 1.0
    figure.ruler("y").lim(0, top)
    lrs = [top * quarter / 4 for quarter in range(5)]
    figure.ruler("y").ticks(lrs, [f"{lr:.2e}" if lr else "0" for lr in lrs])
    figure.ruler("x").lim(0, last + 1)
    ticks = round_ticks(last + 1)
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])


def round_ticks(last: int, most: int = 8) -> list[int]:
    """Whole numbers from 0 to `last` in steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(1, last / most)))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if last / (factor * power) <= most)
    return list(range(0, last + 1, step))


def _legend(curves: Sequence[Curve], colour: bool) -> Text:
    legend = Text("  ", no_wrap=True)
    for number, curve in enumerate(curves):
        mark = MARKS[number % len(MARKS)]
        sample = "⣀⡠⠔⠊⠉" if colour or mark == "braille" else mark * 3
        legend.append(sample, style=RICH_COLOURS[number % len(RICH_COLOURS)] if colour else "")
        legend.append(f" {curve.name}    ")
    return legend
