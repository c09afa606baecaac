"""Learning-rate curves: their statistics, key updates, and a plan's summary in a few lines."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launcher.plan.learning_rate import planned_lrs
from launcher.plan.revision import schedule_of
from launcher.plan.schema import ChoiceReason, Plan
from launcher.schedule.curve import Schedule, lr_curve, make_schedule

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """The learning rate of each update in `updates`, which are in increasing order.

    `floor_lr`: the learning rate at the end of the decay, if known.
    """

    name: str
    lrs: tuple[float, ...]
    updates: tuple[int, ...]
    floor_lr: float | None = None

    @classmethod
    def of(cls, name: str, lrs: Sequence[float], floor_lr: float | None = None) -> Curve:
        """The curve of a whole run, from update 0."""
        return cls(name, tuple(lrs), tuple(range(len(lrs))), floor_lr)

    def at(self, update: int) -> float | None:
        """The learning rate of an update; None if the curve does not have the update."""
        index = bisect_left(self.updates, update)
        return self.lrs[index] if index < len(self.updates) and self.updates[index] == update else None


@dataclass(frozen=True)
class CurveStats:
    """Statistics of a curve. `area` is the sum of all learning rates.

    `half_update` and `highest_update` are the first updates at half of the highest learning rate and at the highest.
    `at_floor`: number of updates at `floor_lr` or below. `area_updates`: the area as a number of updates at the highest
    learning rate.
    """

    highest_lr: float
    highest_update: int
    half_update: int
    floor_lr: float
    at_floor: int
    area: float
    area_updates: float


def curve_stats(curve: Curve) -> CurveStats:
    """The statistics of a curve with one update or more. Without `floor_lr` the lowest learning rate is the floor."""
    highest, floor = max(curve.lrs), min(curve.lrs) if curve.floor_lr is None else curve.floor_lr
    area, half = math.fsum(curve.lrs), min(highest, highest / 2)
    return CurveStats(
        highest_lr=highest,
        highest_update=curve.updates[curve.lrs.index(highest)],
        half_update=next(u for u, lr in zip(curve.updates, curve.lrs, strict=True) if lr >= half),
        floor_lr=floor,
        # A floor computed as a fraction of the peak can be off by one ulp.
        at_floor=sum(lr <= floor * (1 + 1e-12) for lr in curve.lrs),
        area=area,
        area_updates=area / highest if highest else 0.0,
    )


def key_updates(curve: Curve, marks: Mapping[int, str] | None = None) -> dict[int, str]:
    """The key updates of a curve in order, each with a description. `marks`: additional updates and descriptions."""
    found = curve_stats(curve)
    total, after = len(curve.lrs), curve.updates.index(found.highest_update)
    named = [(curve.updates[0], "first update"), (found.half_update, "half of the peak")]
    named.append((found.highest_update, "peak"))
    last_at_peak = curve.updates[max(i for i, lr in enumerate(curve.lrs) if lr == found.highest_lr)]
    if last_at_peak > found.highest_update + 1:
        named.append((last_at_peak, "last at the peak"))
    down = next((i for i in range(after, total) if curve.lrs[i] <= found.highest_lr / 2), None)
    if down is not None and down < total - 1:
        named.append((curve.updates[down], "half-way down"))
    named += [(curve.updates[total // 2], "middle of the run"), (curve.updates[-1], "last update")]
    return _joined([*named, *(marks or {}).items()])


def _joined(named: Sequence[tuple[int, str]]) -> dict[int, str]:
    words: dict[int, list[str]] = {}
    for update, word in named:
        words.setdefault(update, []).append(word)
    return {update: ", ".join(words[update]) for update in sorted(words)}


def schedule_marks(schedule: Schedule) -> dict[int, str]:
    """The updates at which segments of a schedule start and its warm-up was lengthened, with descriptions."""
    named = [(segment.start, f"{segment.kind} to {segment.to_share:.3g} of the peak") for segment in schedule.segments]
    named += [(update, f"warm-up now {warmup} updates") for update, warmup in schedule.extensions]
    return _joined([(update, word) for update, word in named if update < schedule.total_updates])


def plan_marks(plan: Plan) -> dict[int, str]:
    """`schedule_marks` of a plan; empty if the plan keeps the user's scheduler."""
    return schedule_marks(schedule_of(plan)) if plan.learning_rate.schedule is not None else {}


def plan_curve(plan: Plan, name: str | None = None) -> Curve:
    """The curve of a plan."""
    name = name or plan.learning_rate.shape
    if plan.learning_rate.schedule is not None and plan.learning_rate.advance:
        return schedule_curve(schedule_of(plan), name)
    lr_of = planned_lrs(plan)
    return Curve.of(name, [lr_of(update) for update in range(plan.length.total_updates)])


def with_shapes(own: Curve, shapes: Sequence[str], peak_lr: float, warmup: int, total: int) -> list[Curve]:
    """The curve, and those of other shapes with the same peak, warm-up and length and their default floors."""
    others = [
        make_schedule(shape, peak_lr=peak_lr, warmup_updates=warmup, total_updates=total)
        for shape in shapes
        if shape != own.name
    ]
    return [own, *(schedule_curve(schedule) for schedule in others)]


def schedule_curve(schedule: Schedule, name: str | None = None) -> Curve:
    """The curve of a schedule."""
    floor = schedule.floor_lr if schedule.floor_lr < schedule.peak_lr else None
    return Curve.of(name or schedule.shape, lr_curve(schedule), floor)


def sparkline(lrs: Sequence[float], width: int = 60) -> str:
    """The curve in one line of at most `width` characters; the highest learning rate is a full bar."""
    columns = min(width, len(lrs))
    edges = [column * len(lrs) // columns for column in range(columns + 1)]
    heights = [max(lrs[a:b]) for a, b in pairwise(edges)]
    top = max(heights) or 1.0
    return "".join(BARS[max(0, math.ceil(height / top * len(BARS)) - 1)] for height in heights)


def lr_lines(plan: Plan) -> list[str]:
    """A plan's learning rate in a few lines: summary, small plot, statistics, and the reasons."""
    planned, curve = plan.learning_rate, plan_curve(plan)
    found = curve_stats(curve)
    total = plan.length.total_updates
    return [
        f"{planned.shape}: up to {planned.peak_lr:.3g} in {planned.warmup_updates} updates of warm-up, "
        f"then to {curve.lrs[-1]:.3g} at the last of {total}",
        sparkline(curve.lrs),
        f"half of the peak at update {found.half_update}, the peak at {found.highest_update}; "
        f"equivalent to {found.area_updates:.3g} updates at the peak",
        *(reason_line(reason) for reason in planned.reasons),
    ]


def reason_line(reason: ChoiceReason) -> str:
    """A choice with its reasonable range and reason; "(heuristic)" if there is no evidence."""
    head = f"{reason.choice.replace('_', ' ')} {short(reason.value)}"
    if reason.low is not None and reason.high is not None and reason.low != reason.high:
        head += f" ({short(reason.low)} to {short(reason.high)})"
    label = " (heuristic)" if reason.heuristic else ""
    return f"{head}: {reason.reason}{label}"


def short(value: Any) -> str:
    """A float with three digits; other values as text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
