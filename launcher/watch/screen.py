"""A live view of a run in the terminal: its status, and small plots of loss and learning rate."""

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
from launcher.watch.run_session import Record, is_removed, run_removed
from launcher.watch.sample_metrics import sampled
from launcher.watch.status import RunStatus, read_status
from launcher.watch.status_report import one_line, status_view

EVERY_SECONDS = 2.0
PLAIN_EVERY_SECONDS = 10.0
_MAX_CPU_SHARE = 0.05
_PLOT_HEIGHT, _MIN_PLOT_WIDTH = 9, 40
_OTHER_LINES = 11


def watch_run(run: RunDir, console: Console) -> RunStatus:
    """Shows the run until it has ended or is lost; returns its last status. Raises RunFailed if it was removed.

    In a terminal the screen is redrawn every two seconds. Elsewhere a line is printed every ten seconds if something
    has changed.
    """
    first = _state_written(run)
    status = _show_on_screen(run, console) if console.is_terminal else _print_lines(run, console)
    # state.json is replaced atomically: if it is missing, the folder is being removed.
    if is_removed(run) or (first is not None and _state_written(run) is None):
        raise run_removed(run)
    return status


def _show_on_screen(run: RunDir, console: Console) -> RunStatus:
    status = read_status(run, time.time())
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while status.live:
            start = time.monotonic()
            status = read_status(run, time.time())
            live.update(_screen(status, sampled(run.metrics_file), console), refresh=True)
            if status.live:
                # A status that takes long to read (many nodes, a slow file system) is read less often.
                time.sleep(max(EVERY_SECONDS, (time.monotonic() - start) / _MAX_CPU_SHARE))
    return status


def _print_lines(run: RunDir, console: Console) -> RunStatus:
    printed = ""
    while True:
        status = read_status(run, time.time())
        line = one_line(status)
        if line != printed:
            console.print(Text(line), soft_wrap=True)
            printed = line
        if not status.live:
            return status
        _wait(run, PLAIN_EVERY_SECONDS)


def _wait(run: RunDir, seconds: float) -> None:
    """Waits for `seconds`, or until state.json changes or is removed."""
    before, deadline = _state_written(run), time.monotonic() + seconds
    while before is not None and time.monotonic() < deadline and _state_written(run) == before:
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _state_written(run: RunDir) -> int | None:
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
    """Loss and learning rate per update, side by side in `width` columns; no plot for fewer than two updates."""
    each = max(_MIN_PLOT_WIDTH, width // 2 - 2)
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
