"""`launcher lr`: show and explain the learning rate of a job, of a run, or of an existing DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.lr_output import show_report, write_curves
from launcher.errors import Problem, RequestError, nearest

if TYPE_CHECKING:
    from launcher.lr_report.report import LRReport


def lr(
    target: Annotated[
        str | None, typer.Argument(metavar="[JOB.YAML | RUN]", help="A job file or run directory.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those in the job or JSON."),
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option("--deepspeed", metavar="FILE", help="Show the learning rate of this DeepSpeed JSON.")
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="With --deepspeed: the run's length. Default: the JSON's.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="SHAPE,…", help="Overlay shapes with the same peak, warm-up and length.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plot as PNG (needs matplotlib).")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the learning rates as CSV.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the learning rate of every update, and explain how it was chosen. Starts nothing.

    For a job file, this is the planned curve; for a run directory, the planned and the applied one. With --deepspeed,
    it is what the DeepSpeed engine applies under an existing JSON.
    """
    shapes = _shapes(compare)
    given = [*([target] if target else []), *(overrides or [])]
    if updates is not None and deepspeed is None:
        raise RequestError(Problem("this needs --deepspeed", key="--updates", hint="for a job, set train.max_steps=N"))
    if deepspeed is not None:
        from launcher.lr_report.deepspeed_json import deepspeed_report

        report = deepspeed_report(deepspeed, given, updates, shapes)
    else:
        report = _of_target(target, overrides or [], shapes)
    write_curves(report, png, csv)
    show_report(report, json)


def _of_target(target: str | None, overrides: list[str], shapes: Sequence[str]) -> LRReport:
    from launcher.lr_report.plan_report import plan_report, run_report

    if target is None:
        hint = "launcher lr job.yaml, launcher lr RUN or launcher lr --deepspeed ds_config.json"
        raise RequestError(Problem("a job file, a run directory or a DeepSpeed JSON is needed", hint=hint))
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise RequestError(
                Problem(f"the plan of a run is fixed and takes no overrides, found {overrides[0]}", file=target)
            )
        return run_report(path, shapes)
    if path.suffix == ".json":
        hint = f"for a DeepSpeed JSON: launcher lr --deepspeed {target}"
        raise RequestError(Problem("this is a JSON file, not a job file", file=target, hint=hint))
    from launcher.job import load_job
    from launcher.runs.planning import make_plan

    loaded = load_job(path, *overrides)
    plan = make_plan(loaded, on_progress=lambda progress: typer.echo(f"{progress['message']} …", err=True))
    return plan_report(plan, shapes)


def _shapes(compare: str | None) -> list[str]:
    """The shapes of --compare. Raises RequestError for an unknown one."""
    from launcher.schedule.curve import SHAPES

    shapes = [shape.strip() for shape in compare.split(",")] if compare is not None else []
    for shape in shapes:
        if shape not in SHAPES:
            close = nearest(shape, SHAPES)
            hint = f"did you mean {close}?" if close else f"one or more of {', '.join(SHAPES)}"
            raise RequestError(Problem(f"unknown shape {shape!r}", key="--compare", hint=hint))
    return list(dict.fromkeys(shapes))
