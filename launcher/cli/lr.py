"""`launcher lr`: the learning rate of a job, of a run, or of an existing DeepSpeed JSON, seen and explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.errors import Problem, RequestError, nearest

if TYPE_CHECKING:
    from launcher.lr_report.curves import Curve
    from launcher.lr_report.report import Report
    from launcher.plan.schema import Plan


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
    if target is None:
        hint = "launcher lr job.yaml, launcher lr RUN or launcher lr --deepspeed ds_config.json"
        raise RequestError(Problem("a job file, a run directory or a DeepSpeed JSON is needed", hint=hint))
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise RequestError(Problem(f"a run's plan is fixed: {overrides[0]} changes nothing", file=target))
        return _of_run(path, shapes)
    if path.suffix == ".json":
        message = "this is a JSON, and not a job file"
        raise RequestError(Problem(message, file=target, hint=f"a DeepSpeed JSON: launcher lr --deepspeed {target}"))
    return _of_job(path, overrides, shapes)


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


def _of_job(path: Path, overrides: list[str], shapes: Sequence[str]) -> Report:
    from launcher.lr_report.curves import plan_curve, with_shapes
    from launcher.runs.planning import plan_job_file

    plan = plan_job_file(path, overrides, lambda progress: typer.echo(f"{progress['message']} …", err=True))
    rate, total = plan.learning_rate, plan.length.total_updates
    curves = with_shapes(plan_curve(plan), shapes, rate.peak_lr, rate.warmup_updates, total)
    title = f"{plan.job.name}: {rate.shape}, {total:,} updates, {rate.warmup_updates:,} of warm-up"
    return replace(_of_plan(plan, title, curves), warnings=_own_scheduler_warnings(plan))


def _of_run(path: Path, shapes: Sequence[str]) -> Report:
    from launcher.lr_report.curves import with_shapes
    from launcher.lr_report.run_curves import run_curves
    from launcher.run_dir import RunDir

    run = RunDir(path.resolve())
    if not run.plan_file.is_file():
        raise RequestError(Problem("there is no plan.json here, so this is not a run directory", file=str(path)))
    found = run_curves(run)
    rate, total = found.plan.learning_rate, found.plan.length.total_updates
    first, *others = found.curves
    overlaid = with_shapes(first, shapes, rate.peak_lr, rate.warmup_updates, total)
    title = f"{path.name}: {rate.shape}, {total:,} updates, {rate.warmup_updates:,} of warm-up"
    return replace(
        _of_plan(found.plan, title, [*overlaid, *others]),
        notes=found.notes,
        warnings=(*_own_scheduler_warnings(found.plan), *found.warnings),
    )


def _of_plan(plan: Plan, title: str, curves: Sequence[Curve]) -> Report:
    from launcher.lr_report.curves import plan_marks
    from launcher.lr_report.report import Report

    names: tuple[str, ...] = ("optimizer", "scheduler")
    blocks = {name: plan.ds_config[name] for name in names if name in plan.ds_config}
    return Report(
        title=title,
        curves=tuple(curves),
        peak_lr=plan.learning_rate.peak_lr,
        marks=plan_marks(plan),
        reasons=plan.learning_rate.reasons,
        blocks=blocks,
        blocks_notes=_pasted(plan, blocks),
    )


def _pasted(plan: Plan, blocks: dict[str, Any]) -> tuple[str, ...]:
    """What differs where the blocks are pasted into a DeepSpeed script of one's own."""
    from launcher.lr_report.report import paste_notes
    from launcher.plan.revision import extensions

    if plan.learning_rate.schedule is None:
        return ("The scheduler is your own: DeepSpeed starts and steps it, here as in any script.",)
    if not plan.learning_rate.advance:
        return ("The curve is that of a script: DeepSpeed starts and steps the scheduler, as it does with the blocks.",)
    if "scheduler" not in blocks:
        shape = plan.learning_rate.shape
        return (
            f"DeepSpeed has no scheduler class for the shape {shape}: the launcher gives deepspeed.initialize "
            "a scheduler object, and there is no block to paste.",
        )
    if extensions(plan):
        return ("The blocks hold the warm-up in force now; the curve before it was lengthened is not in them.",)
    return paste_notes(blocks["scheduler"], blocks["optimizer"]["params"]["lr"])


def _own_scheduler_warnings(plan: Plan) -> tuple[str, ...]:
    """What the scheduler of the user's own JSON does that its author may not expect."""
    from launcher.schedule.safety import deepspeed_warnings

    if plan.learning_rate.schedule is not None:
        return ()
    scheduler, lr = plan.ds_config["scheduler"], plan.ds_config["optimizer"]["params"]["lr"]
    return tuple(deepspeed_warnings(scheduler["type"], scheduler["params"], lr, plan.length.total_updates))
