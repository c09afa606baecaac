"""A report on learning-rate curves: plot, table, figures, reasons and JSON blocks, for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.lr_report.curves import Curve, Figures, figures, interesting, reason_line
from launcher.lr_report.terminal_plot import plot_text
from launcher.plan.schema import Reason
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed

WIDEST = 120
STEP_ONCE = (
    "Call engine.lr_scheduler.step() once after a fresh deepspeed.initialize, and not after load_checkpoint, "
    "and it makes every update at the rate shown here; the launcher does."
)


@dataclass(frozen=True)
class Report:
    """What there is to say about some curves. The first curve is the one that the table is about.

    `peak_lr` is the rate that was asked for; `marks` are updates to show besides the usual ones. `blocks` are
    the DeepSpeed blocks to paste, told by `blocks_notes`.
    """

    title: str
    curves: tuple[Curve, ...]
    peak_lr: float | None = None
    marks: dict[int, str] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    blocks: dict[str, Any] | None = None
    blocks_notes: tuple[str, ...] = ()


def report_json(report: Report) -> str:
    """The whole report as JSON; rates with all their digits."""
    first = report.curves[0]
    document = {
        "title": report.title,
        "peak_lr": report.peak_lr,
        "curves": [_curve_json(curve) for curve in report.curves],
        "points": [
            {"update": update, "lr": first.at(update), "what": what}
            for update, what in interesting(first, report.marks).items()
        ],
        "reasons": [reason.model_dump(mode="json") for reason in report.reasons],
        "notes": report.notes,
        "warnings": report.warnings,
        "blocks": report.blocks,
        "blocks_notes": report.blocks_notes,
    }
    return json.dumps(document, indent=2)


def _curve_json(curve: Curve) -> dict[str, Any]:
    return {
        "name": curve.name,
        **asdict(figures(curve)),
        "updates": list(curve.updates),
        "rates": list(curve.rates),
    }


def print_report(report: Report, console: Console) -> None:
    """Prints a report for people: readable on 80 columns, and without colour."""
    console.print(Text(report.title, style="bold"))
    width = max(40, min(console.width, WIDEST))
    # Soft wrap leaves the plot's lines as they are, whatever the console's width.
    colour = console.color_system is not None and not console.no_color
    console.print(plot_text(report.curves, width, colour=colour), soft_wrap=True)
    console.print(_points(report))
    console.print()
    console.print(_figures(report))
    _peak_line(report, console)
    _paragraphs("notes", report.notes, console)
    _paragraphs("warnings", report.warnings, console, "yellow")
    _paragraphs("why", (_reason(reason) for reason in report.reasons), console)
    _blocks(report, console)


def _points(report: Report) -> Table:
    first, *others = report.curves
    highest = max(first.rates) or 1.0
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("update", justify="right")
    table.add_column(first.name, justify="right")
    table.add_column("of peak", justify="right")
    for curve in others:
        table.add_column(curve.name, justify="right")
    table.add_column("", style="dim")
    for update, what in interesting(first, report.marks).items():
        rate = first.at(update)
        share = "" if rate is None else f"{rate / highest:.1%}"
        table.add_row(f"{update:,}", _rate(rate), share, *(_rate(curve.at(update)) for curve in others), what)
    return table


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.3e}"


def _figures(report: Report) -> Table:
    found = [figures(curve) for curve in report.curves]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for curve in report.curves:
        table.add_column(curve.name, justify="right")
    rows: dict[str, Callable[[Figures], str]] = {
        "highest rate": lambda of: _rate(of.highest_lr),
        "  first at update": lambda of: f"{of.highest_update:,}",
        "  half of it at update": lambda of: f"{of.half_update:,}",
        "floor": lambda of: _rate(of.floor_lr),
        "  updates at the floor": lambda of: f"{of.at_floor:,}",
        "area: sum of all rates": lambda of: f"{of.area:.4e}",
        "  in updates at the peak": lambda of: f"{of.area_updates:,.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(of) for of in found))
    return table


def _peak_line(report: Report, console: Console) -> None:
    """Says so where the curve never reaches the peak that was asked for."""
    highest = max(report.curves[0].rates)
    if report.peak_lr is not None and highest < report.peak_lr:
        console.print(f"The highest rate, {highest:.7g}, stays below the peak {report.peak_lr:g} that was asked for.")


def late_notes(scheduler: dict[str, Any], optimizer_lr: float) -> tuple[str, ...]:
    """What differs where a generated scheduler block is pasted into a DeepSpeed script of one's own."""
    first, second = simulate_deepspeed(scheduler["type"], scheduler["params"], optimizer_lr, 2)
    start = f"update 0 runs at {first:.4g}, and update 1 at {second:.4g}, shown here for update 0"
    if first == second:
        start = f"updates 0 and 1 both run at {first:.4g}, shown here for update 0 alone"
    return (f"Pasted into a DeepSpeed script of your own, every rate comes one update later: {start}.", STEP_ONCE)


def _reason(reason: Reason) -> str:
    sources = f" [{'; '.join(reason.sources)}]" if reason.sources else ""
    return reason_line(reason) + sources


def _paragraphs(title: str, lines: Iterable[str], console: Console, style: str = "") -> None:
    for number, line in enumerate(lines):
        if number == 0:
            console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(Text(line, style=style), (0, 0, 0, 2), expand=False))


def _blocks(report: Report, console: Console) -> None:
    """The notes first: what is to be pasted then stands alone at the end."""
    _paragraphs("DeepSpeed JSON", report.blocks_notes, console)
    if report.blocks is not None:
        console.print(Text(json.dumps(report.blocks, indent=2)), soft_wrap=True)
