"""The learning rate of a run, from its directory alone: what was planned, how that changed, and what was applied."""

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
    """A run's newest plan; its curves: of that plan, of those before it, and as applied; and what to say of them."""

    plan: Plan
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def run_curves(run: RunDir) -> RunCurves:
    """What was planned and what was applied. Raises LauncherError for a damaged plan."""
    plans = [read_plan(path) for path in (run.plan_file, *run.plan_revisions())]
    planned = [plan_curve(plan, name) for plan, name in zip(plans, _names(plans), strict=True)]
    applied = applied_curve(run)
    notes, warnings = _extension_notes(run), []
    if len(notes) >= len(plans):
        warnings.append("The events tell of more extensions of the warm-up than there are plan revisions here.")
    notes += [f"After {p.resumed.samples:,} samples: {p.resumed.arithmetic}" for p in _resumptions(plans) if p.resumed]
    note, differs = _applied_note(plans, planned, applied)
    (warnings if differs else notes).append(note)
    if count := run.damaged_lines().get(run.metrics_file.name):
        warnings.append(f"Lines of {run.metrics_file.name} that are damaged, and left out here: {count}.")
    shown = [*reversed(planned), *([applied] if applied.rates else [])]
    return RunCurves(plans[-1], tuple(shown), tuple(notes), tuple(warnings))


def _resumptions(plans: Sequence[Plan]) -> list[Plan]:
    """The plans with which the run went on under other conditions."""
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
    """The rate that each update was made with, as metrics.jsonl has it.

    Where a run went back to a checkpoint, what came after that the first time does not count.
    """
    rates: dict[int, float] = {}
    for line in run.metrics():
        update, rate = line["update"], number_of(line.get("lr"))
        if rate is None:  # a user's own script reports what it likes
            continue
        if rates and update <= max(rates):
            rates = {done: earlier for done, earlier in rates.items() if done < update}
        rates[update] = rate
    return Curve("applied", tuple(rates.values()), tuple(rates))


def _extension_notes(run: RunDir) -> list[str]:
    return [
        f"At update {event.get('update')} the warm-up was lengthened to {event.get('warmup_updates')} updates, "
        f"to a peak of {number_text(number_of(event.get('peak_lr')), 'g')}."
        for event in run.events()
        if event["event"] == "warmup_extended"
    ]


def _applied_note(plans: Sequence[Plan], planned: Sequence[Curve], applied: Curve) -> tuple[str, bool]:
    """A sentence on how the applied rates agree with the plans, and whether one agrees with none."""
    if not applied.rates:
        return "No update was made yet.", False
    made = f"{len(applied.rates)} of {len(planned[-1].rates)} updates were made"
    other = [u for u in applied.updates if applied.at(u) != planned[_newest(plans, u)].at(u)]
    if not other:
        return f"{made}, every one at exactly the planned rate.", False
    odd = [u for u in other if all(applied.at(u) != curve.at(u) for curve in planned)]
    if not odd:
        return f"{made}, {len(other)} of them at exactly the rate of an earlier plan, the others of the newest.", False
    first = odd[0]
    wanted = planned[_newest(plans, first)].at(first)
    return f"{made}, {len(odd)} not at a planned rate: update {first} at {applied.at(first)!r}, not {wanted!r}.", True


def _newest(plans: Sequence[Plan], update: int) -> int:
    """The newest plan that was there when the update was made."""
    begun = [n for n, plan in enumerate(plans) if plan.resumed is None or plan.resumed.update <= update]
    return begun[-1]
