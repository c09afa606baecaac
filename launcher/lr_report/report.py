"""A report on learning-rate curves: plot, tables, reasons and JSON blocks, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.lr_report.curves import Curve, CurveStats, curve_stats, key_updates, reason_line
from launcher.lr_report.terminal_plot import plot_text
from launcher.plan.schema import ChoiceReason
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed

MAX_WIDTH = 120
STEP_ONCE = (
    "Call engine.lr_scheduler.step() once after a fresh deepspeed.initialize, but not after load_checkpoint: every "
    "update then has the learning rate shown here. The launcher does this."
)


@dataclass(frozen=True)
class LRReport:
    """The content of a report. The table is about the first curve.

    `peak_lr` is the requested peak; `marks` are additional updates for the table, with descriptions. `blocks` are the
    DeepSpeed blocks to paste, explained by `blocks_notes`.
    """

    title: str
    curves: tuple[Curve, ...]
    peak_lr: float | None = None
    marks: dict[int, str] = field(default_factory=dict)
    reasons: tuple[ChoiceReason, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    blocks: dict[str, Any] | None = None
    blocks_notes: tuple[str, ...] = ()


def report_json(report: LRReport) -> str:
    """The report as JSON; learning rates with all digits."""
    first = report.curves[0]
    document = {
        "title": report.title,
        "peak_lr": report.peak_lr,
        "curves": [_curve_json(curve) for curve in report.curves],
        "points": [
            {"update": update, "lr": first.at(update), "what": what}
            for update, what in key_updates(first, report.marks).items()
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
        **asdict(curve_stats(curve)),
        "updates": list(curve.updates),
        "rates": list(curve.lrs),
    }


def print_report(report: LRReport, console: Console) -> None:
    """Prints a report, readable with 80 columns and without colour."""
    console.print(Text(report.title, style="bold"))
    width = max(40, min(console.width, MAX_WIDTH))
    # Soft wrap keeps the plot's lines unchanged for any console width.
    colour = console.color_system is not None and not console.no_color
    console.print(plot_text(report.curves, width, colour=colour), soft_wrap=True)
    console.print(_points(report))
    console.print()
    console.print(_statistics(report))
    _peak_line(report, console)
    _paragraphs("notes", report.notes, console)
    _paragraphs("warnings", report.warnings, console, "yellow")
    _paragraphs("why", (_reason(reason) for reason in report.reasons), console)
    _blocks(report, console)


def _points(report: LRReport) -> Table:
    first, *others = report.curves
    highest = max(first.lrs) or 1.0
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("update", justify="right")
    table.add_column(first.name, justify="right")
    table.add_column("of peak", justify="right")
    for curve in others:
        table.add_column(curve.name, justify="right")
    table.add_column("", style="dim")
    for update, what in key_updates(first, report.marks).items():
        lr = first.at(update)
        fraction = "" if lr is None else f"{lr / highest:.1%}"
        table.add_row(f"{update:,}", _lr_text(lr), fraction, *(_lr_text(curve.at(update)) for curve in others), what)
    return table


def _lr_text(lr: float | None) -> str:
    return "" if lr is None else f"{lr:.3e}"


def _statistics(report: LRReport) -> Table:
    found = [curve_stats(curve) for curve in report.curves]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for curve in report.curves:
        table.add_column(curve.name, justify="right")
    rows: dict[str, Callable[[CurveStats], str]] = {
        "highest learning rate": lambda of: _lr_text(of.highest_lr),
        "  first at update": lambda of: f"{of.highest_update:,}",
        "  half of it at update": lambda of: f"{of.half_update:,}",
        "floor": lambda of: _lr_text(of.floor_lr),
        "  updates at the floor": lambda of: f"{of.at_floor:,}",
        "area: sum of all learning rates": lambda of: f"{of.area:.4e}",
        "  in updates at the peak": lambda of: f"{of.area_updates:,.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(of) for of in found))
    return table


def _peak_line(report: LRReport, console: Console) -> None:
    """Prints a line if the curve never reaches the requested peak."""
    highest = max(report.curves[0].lrs)
    if report.peak_lr is not None and highest < report.peak_lr:
        console.print(f"The highest learning rate, {highest:.7g}, is below the requested peak {report.peak_lr:g}.")


def paste_notes(scheduler: dict[str, Any], optimizer_lr: float) -> tuple[str, ...]:
    """Notes on what differs if a generated scheduler block is pasted into another DeepSpeed script."""
    first, second = simulate_deepspeed(scheduler["type"], scheduler["params"], optimizer_lr, 2)
    start = f"update 0 uses {first:.4g}, and update 1 uses {second:.4g}, shown here for update 0"
    if first == second:
        start = f"updates 0 and 1 both use {first:.4g}, shown here only for update 0"
    return (f"In your own DeepSpeed script every learning rate comes one update later: {start}.", STEP_ONCE)


def _reason(reason: ChoiceReason) -> str:
    sources = f" [{'; '.join(reason.sources)}]" if reason.sources else ""
    return reason_line(reason) + sources


def _paragraphs(title: str, lines: Iterable[str], console: Console, style: str = "") -> None:
    for number, line in enumerate(lines):
        if number == 0:
            console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(Text(line, style=style), (0, 0, 0, 2), expand=False))


def _blocks(report: LRReport, console: Console) -> None:
    """Prints the notes first, and the JSON to paste at the end."""
    _paragraphs("DeepSpeed JSON", report.blocks_notes, console)
    if report.blocks is not None:
        console.print(Text(json.dumps(report.blocks, indent=2)), soft_wrap=True)
