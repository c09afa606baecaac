"""`launcher lr`: the learning rate of a job, of a run, or of an existing DeepSpeed JSON, seen and explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import Problem, RequestError, nearest

if TYPE_CHECKING:
    from launcher.lr_report.report import Report


def lr(
    target: Annotated[
        str | None, typer.Argument(metavar="[JOB.YAML | RUN]", help="A job file or run directory.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values set over those of the job or the JSON."),
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option("--deepspeed", metavar="FILE", help="Show what this DeepSpeed JSON does.")
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="With --deepspeed: updates of the run. Default: its total_num_steps.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="SHAPE,…", help="Overlay shapes with the same peak, warm-up and length.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plot as PNG (needs matplotlib).")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every update's rate as CSV.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the learning rate of every update, and why it is so. Starts nothing.

    Of a job file: the planned curve. Of a run directory: planned and applied. With --deepspeed: what an existing
    DeepSpeed JSON really does, as the engine applies it.
    """
    shapes = _shapes(compare)
    given = [*([target] if target else []), *(overrides or [])]
    if updates is not None and deepspeed is None:
        raise RequestError(Problem("it goes with --deepspeed", key="--updates", hint="train.max_steps=N sets a job's"))
    if deepspeed is not None:
        from launcher.lr_report.deepspeed_json import deepspeed_report

        report = deepspeed_report(deepspeed, given, updates, shapes)
    else:
        report = _of_target(target, overrides or [], shapes)
    _write_files(report, png, csv)
    _show(report, json)


def _show(report: Report, as_json: bool) -> None:
    from rich.console import Console

    from launcher.lr_report.report import print_report, report_json

    if as_json:
        typer.echo(report_json(report))
    else:
        print_report(report, Console(highlight=False))


def _write_files(report: Report, png: Path | None, csv: Path | None) -> None:
    from launcher.lr_report.files import csv_text, png_bytes, write_file

    if png is not None:
        write_file(png, png_bytes(report.curves, report.title), "--png")
    if csv is not None:
        write_file(csv, csv_text(report.curves), "--csv")
    for path in (png, csv):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)


def _of_target(target: str | None, overrides: list[str], shapes: Sequence[str]) -> Report:
    from launcher.lr_report.plan_report import plan_report, run_report

    if target is None:
        hint = "launcher lr job.yaml, launcher lr RUN or launcher lr --deepspeed ds_config.json"
        raise RequestError(Problem("a job file, a run directory or a DeepSpeed JSON is needed", hint=hint))
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise RequestError(Problem(f"a run's plan is fixed: {overrides[0]} changes nothing", file=target))
        return run_report(path, shapes)
    if path.suffix == ".json":
        message = "this is a JSON, and not a job file"
        raise RequestError(Problem(message, file=target, hint=f"a DeepSpeed JSON: launcher lr --deepspeed {target}"))
    from launcher.job import load_job
    from launcher.runs.planning import make_plan

    loaded = load_job(path, *overrides)
    plan = make_plan(loaded, on_progress=lambda progress: typer.echo(f"{progress['message']} …", err=True))
    return plan_report(plan, shapes)


def _shapes(compare: str | None) -> list[str]:
    """The shapes of --compare; each must be one."""
    from launcher.schedule.curve import SHAPES

    shapes = [shape.strip() for shape in compare.split(",")] if compare is not None else []
    for shape in shapes:
        if shape not in SHAPES:
            close = nearest(shape, SHAPES)
            hint = f"did you mean {close}?" if close else f"one or more of {', '.join(SHAPES)}"
            raise RequestError(Problem(f"no shape {shape!r}", key="--compare", hint=hint))
    return list(dict.fromkeys(shapes))
