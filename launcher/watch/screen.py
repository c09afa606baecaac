"""A run live in the terminal: its status, and small plots of loss and learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from launcher.run_dir import RunDir
from launcher.watch.history import sampled
from launcher.watch.session import Record, gone, is_gone
from launcher.watch.status import RunStatus, read_status
from launcher.watch.status_report import one_line, status_view

EVERY_SECONDS = 2.0
PLAIN_EVERY_SECONDS = 10.0
_MOST_OF_A_CORE = 0.05
_PLOT_HEIGHT, _NARROWEST = 9, 40
_OTHER_LINES = 11


def watch_run(run: RunDir, console: Console) -> RunStatus:
    """Shows the run until it has ended or is lost; its last status. Raises RunFailed where it is gone.

    In a terminal the screen is drawn anew every two seconds. Elsewhere a line comes every ten seconds when something
    has changed.
    """
    began = _written(run)
    status = _shown_in_screen(run, console) if console.is_terminal else _plain_lines(run, console)
    # state.json is replaced and never missing: without it the rest of the folder is being removed as well.
    if is_gone(run) or (began is not None and _written(run) is None):
        raise gone(run)
    return status


def _shown_in_screen(run: RunDir, console: Console) -> RunStatus:
    status = read_status(run, time.time())
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while status.live:
            began = time.monotonic()
            status = read_status(run, time.time())
            live.update(_screen(status, sampled(run.metrics_file), console), refresh=True)
            if status.live:
                # Many nodes on a slow file system are asked less often.
                time.sleep(max(EVERY_SECONDS, (time.monotonic() - began) / _MOST_OF_A_CORE))
    return status


def _plain_lines(run: RunDir, console: Console) -> RunStatus:
    told = ""
    while True:
        status = read_status(run, time.time())
        line = one_line(status)
        if line != told:
            console.print(Text(line), soft_wrap=True)
            told = line
        if not status.live:
            return status
        _wait(run, PLAIN_EVERY_SECONDS)


def _wait(run: RunDir, seconds: float) -> None:
    """Waits so long, or until the state changes or is gone."""
    before, deadline = _written(run), time.monotonic() + seconds
    while before is not None and time.monotonic() < deadline and _written(run) == before:
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _written(run: RunDir) -> int | None:
    try:
        return run.state_file.stat().st_mtime_ns
    except OSError:
        return None


def _screen(status: RunStatus, metrics: Sequence[Record], console: Console) -> Group:
    width, height = console.size
    plots = plots_of(metrics, width, colour=console.color_system is not None and not console.no_color)
    used = _OTHER_LINES + (_PLOT_HEIGHT + 1 if plots else 0)
    view = status_view(status, most_nodes=max(1, height - used))
    return Group(view, Text(), Columns(plots, padding=(0, 2))) if plots else view


def plots_of(metrics: Sequence[Record], width: int, colour: bool) -> list[Text]:
    """Loss and learning rate over the updates, side by side in `width` columns; none before there are two updates."""
    each = max(_NARROWEST, width // 2 - 2)
    plots = (
        _plot("loss", metrics, "loss", each, colour, lambda value: f"{value:.3f}"),
        _plot("learning rate", metrics, "lr", each, colour, lambda value: f"{value:.1e}"),
    )
    return [plot for plot in plots if plot is not None]


def _plot(
    title: str, metrics: Sequence[Record], key: str, width: int, colour: bool, text: Callable[[float], str]
) -> Text | None:
    points = [(line["update"] + 1, float(line[key])) for line in metrics if _is_number(line.get(key))]
    if len(points) < 2:
        return None
    import plotext

    updates, values = [point[0] for point in points], [point[1] for point in points]
    low, high = min(values), max(values)
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, _PLOT_HEIGHT)
    signal = figure.signal(updates, values, marker=plotext.marker("braille", "cyan" if colour else None))
    signal.lines()
    figure.draw(signal)
    figure.ruler("y").lim(low, high if high > low else low + (abs(low) or 1.0))
    figure.ruler("y").ticks([low, high], [text(low), text(high)])
    ends = sorted({updates[0], updates[-1]})
    figure.ruler("x").ticks(ends, [f"{end:,}" for end in ends])
    drawn = str(figure.build().string(colorless=not colour)).rstrip("\n")
    return Text("\n").join((Text(title, style="bold"), Text.from_ansi(drawn, no_wrap=True)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
