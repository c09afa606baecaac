"""What `launcher lr` prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from launcher.lr_report.report import LRReport


def show_report(report: LRReport, as_json: bool) -> None:
    """Prints a report as text or as JSON."""
    from rich.console import Console

    from launcher.lr_report.report import print_report, report_json

    if as_json:
        typer.echo(report_json(report))
    else:
        print_report(report, Console(highlight=False))


def write_curves(report: LRReport, png: Path | None, csv: Path | None) -> None:
    """Writes the curves of a report to the given files. Raises RequestError if one cannot be written."""
    from launcher.lr_report.files import csv_text, png_bytes, write_file

    if png is not None:
        write_file(png, png_bytes(report.curves, report.title), "--png")
    if csv is not None:
        write_file(csv, csv_text(report.curves), "--csv")
    for path in (png, csv):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)
