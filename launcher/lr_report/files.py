"""Learning-rate curves as files: CSV, and PNG with matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.lr_report.curves import Curve
from launcher.run_dir import write_atomic

LINE_STYLES = ("-", "--", "-.", ":")


def csv_text(curves: Sequence[Curve]) -> str:
    """One line per update and one column per curve, with all digits; empty if a curve does not have the update."""
    columns = [dict(zip(curve.updates, curve.lrs, strict=True)) for curve in curves]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["update", *(curve.name for curve in curves)])
    for update in sorted(set().union(*columns)):
        writer.writerow([update, *(repr(column[update]) if update in column else "" for column in columns)])
    return out.getvalue()


def png_bytes(curves: Sequence[Curve], title: str) -> bytes:
    """A PNG of the curves. Raises RequestError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "--png needs matplotlib, which is not installed here"
        raise RequestError(Problem(message, hint="pip install matplotlib")) from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.plot(curve.updates, curve.lrs, style, label=curve.name, linewidth=1.8, zorder=-number)
    axes.set(xlabel="update", ylabel="learning rate", title=title)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(curves) > 1:
        axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def write_file(path: Path, content: str | bytes, option: str) -> None:
    """Writes the file of the command line option `option`. Raises RequestError if that fails."""
    try:
        write_atomic(path, content)
    except OSError as error:
        raise RequestError(Problem(f"cannot be written: {error.strerror}", file=str(path), key=option)) from None
