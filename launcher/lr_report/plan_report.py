"""The learning-rate report of a plan, and of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.lr_report.curves import Curve, plan_curve, plan_marks, with_shapes
from launcher.lr_report.report import LRReport, paste_notes
from launcher.lr_report.run_curves import run_curves
from launcher.plan.revision import extensions
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.schedule.curve import DEEPSPEED_TYPES
from launcher.schedule.safety import deepspeed_warnings


def plan_report(plan: Plan, shapes: Sequence[str]) -> LRReport:
    """The planned curve, with the `shapes` overlaid that have the same peak, warm-up and length."""
    planned, total = plan.learning_rate, plan.length.total_updates
    curves = with_shapes(plan_curve(plan), shapes, planned.peak_lr, planned.warmup_updates, total)
    return replace(_of_plan(plan, _title(plan, plan.job.name), curves), warnings=_own_scheduler_warnings(plan))


def run_report(path: Path, shapes: Sequence[str]) -> LRReport:
    """The planned and the applied curve of the run at `path`. Raises RequestError if it is not a run directory."""
    run = RunDir(path.resolve())
    if not run.plan_file.is_file():
        raise RequestError(Problem("it has no plan.json, so it is not a run directory", file=str(path)))
    found = run_curves(run)
    planned, total = found.plan.learning_rate, found.plan.length.total_updates
    first, *others = found.curves
    overlaid = with_shapes(first, shapes, planned.peak_lr, planned.warmup_updates, total)
    return replace(
        _of_plan(found.plan, _title(found.plan, path.name), [*overlaid, *others]),
        notes=found.notes,
        warnings=(*_own_scheduler_warnings(found.plan), *found.warnings),
    )


def _title(plan: Plan, name: str) -> str:
    planned = plan.learning_rate
    return f"{name}: {planned.shape}, {plan.length.total_updates:,} updates, {planned.warmup_updates:,} of warm-up"


def _of_plan(plan: Plan, title: str, curves: Sequence[Curve]) -> LRReport:
    names: tuple[str, ...] = ("optimizer", "scheduler")
    blocks = {name: plan.ds_config[name] for name in names if name in plan.ds_config}
    return LRReport(
        title=title,
        curves=tuple(curves),
        peak_lr=plan.learning_rate.peak_lr,
        marks=plan_marks(plan),
        reasons=plan.learning_rate.reasons,
        blocks=blocks,
        blocks_notes=_pasted(plan, blocks),
    )


def _pasted(plan: Plan, blocks: dict[str, Any]) -> tuple[str, ...]:
    """What differs if the blocks are pasted into your own DeepSpeed script."""
    if plan.learning_rate.schedule is None:
        return ("The scheduler is your own: DeepSpeed starts and steps it, here as in any script.",)
    if not plan.learning_rate.advance:
        return ("The curve is that of a script: DeepSpeed starts and steps the scheduler, as it does with the blocks.",)
    if "scheduler" not in blocks:
        shape = plan.learning_rate.shape
        lacking = f"DeepSpeed has no scheduler class for the shape {shape}"
        if shape in DEEPSPEED_TYPES:
            lacking = f"{DEEPSPEED_TYPES[shape]} cannot end below its first learning rate"
        return (f"{lacking}: the launcher gives deepspeed.initialize a scheduler object, so no block can be pasted.",)
    if extensions(plan):
        return ("The blocks have the present warm-up; the curve before it was lengthened is not in them.",)
    return paste_notes(blocks["scheduler"], blocks["optimizer"]["params"]["lr"])


def _own_scheduler_warnings(plan: Plan) -> tuple[str, ...]:
    """What the scheduler of the user's JSON does that its author may not expect."""
    if plan.learning_rate.schedule is not None:
        return ()
    scheduler, lr = plan.ds_config["scheduler"], plan.ds_config["optimizer"]["params"]["lr"]
    return tuple(deepspeed_warnings(scheduler["type"], scheduler["params"], lr, plan.length.total_updates))
