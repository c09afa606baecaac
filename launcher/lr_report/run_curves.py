"""The learning rate of a run from its directory: planned, changed and applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.lr_report.curves import Curve, plan_curve
from launcher.plan.revision import extensions, schedule_of
from launcher.plan.schema import Plan
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.watch.number_format import number as number_text
from launcher.watch.run_session import number_of


@dataclass(frozen=True)
class RunCurves:
    """A run's newest plan, the curves of all plans and of the applied learning rates, notes and warnings."""

    plan: Plan
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def run_curves(run: RunDir) -> RunCurves:
    """The planned and applied curves of a run. Raises LauncherError for a damaged plan."""
    plans = [read_plan(path) for path in (run.plan_file, *run.plan_revisions())]
    planned = [plan_curve(plan, name) for plan, name in zip(plans, _names(plans), strict=True)]
    applied = applied_curve(run)
    notes, warnings = _extension_notes(run), []
    if len(notes) >= len(plans):
        warnings.append("There are more warm-up extensions in the events than plan revisions in the run directory.")
    notes += [f"After {p.resumed.samples:,} samples: {p.resumed.arithmetic}" for p in _resumptions(plans) if p.resumed]
    note, differs = _applied_note(plans, planned, applied)
    (warnings if differs else notes).append(note)
    if count := run.damaged_lines().get(run.metrics_file.name):
        warnings.append(f"Damaged lines of {run.metrics_file.name}, which are ignored: {count}.")
    shown = [*reversed(planned), *([applied] if applied.lrs else [])]
    return RunCurves(plans[-1], tuple(shown), tuple(notes), tuple(warnings))


def _resumptions(plans: Sequence[Plan]) -> list[Plan]:
    """The plans of resumes under other conditions."""
    return [plan for before, plan in pairwise(plans) if plan.resumed != before.resumed]


def _names(plans: Sequence[Plan]) -> list[str]:
    resumptions, names = _resumptions(plans), ["planned"]
    for number, plan in enumerate(plans[1:], 1):
        if plan in resumptions and plan.resumed is not None:
            names.append(f"resumed at {plan.resumed.update}")
        elif extensions(plan):
            names.append(f"extended at {schedule_of(plan).extensions[-1][0]}")
        else:
            names.append(f"revision {number}")
    return names


def applied_curve(run: RunDir) -> Curve:
    """The learning rate of each update from metrics.jsonl.

    If a run went back to a checkpoint, the earlier entries after that checkpoint do not count.
    """
    lrs: dict[int, float] = {}
    for line in run.metrics():
        update, lr = line["update"], number_of(line.get("lr"))
        if lr is None:  # the user's script may report anything
            continue
        if lrs and update <= max(lrs):
            lrs = {done: earlier for done, earlier in lrs.items() if done < update}
        lrs[update] = lr
    return Curve("applied", tuple(lrs.values()), tuple(lrs))


def _extension_notes(run: RunDir) -> list[str]:
    return [
        f"At update {event.get('update')} the warm-up was lengthened to {event.get('warmup_updates')} updates, "
        f"to a peak of {number_text(number_of(event.get('peak_lr')), 'g')}."
        for event in run.events()
        if event["event"] == "warmup_extended"
    ]


def _applied_note(plans: Sequence[Plan], planned: Sequence[Curve], applied: Curve) -> tuple[str, bool]:
    """A sentence on how the applied learning rates match the plans, and whether any matches none of them."""
    if not applied.lrs:
        return "The run has not made an update yet.", False
    made = f"{len(applied.lrs)} of {len(planned[-1].lrs)} updates were made"
    other = [u for u in applied.updates if applied.at(u) != planned[_newest(plans, u)].at(u)]
    if not other:
        return f"{made}, all at exactly the planned learning rate.", False
    differing = [u for u in other if all(applied.at(u) != curve.at(u) for curve in planned)]
    if not differing:
        return (
            f"{made}, {len(other)} at exactly the learning rate of an earlier plan, the others at that of the newest.",
            False,
        )
    first = differing[0]
    wanted = planned[_newest(plans, first)].at(first)
    return (
        f"{made}, {len(differing)} not at a planned learning rate: update {first} at {applied.at(first)!r}, "
        f"not {wanted!r}.",
        True,
    )


def _newest(plans: Sequence[Plan], update: int) -> int:
    """The index of the newest plan at the time of the update."""
    current = [n for n, plan in enumerate(plans) if plan.resumed is None or plan.resumed.update <= update]
    return current[-1]
