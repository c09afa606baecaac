"""Learning-rate curves as numbers: their figures, the updates worth showing, and a plan's short form."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launcher.plan.learning_rate import planned_rates
from launcher.plan.revision import schedule_of
from launcher.plan.schema import Plan, Reason
from launcher.schedule.curve import Schedule, lr_curve, make_schedule

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """The rates that updates are made with: one for every number in `updates`, which rise.

    `floor_lr` is what the rate decays to, where that is known.
    """

    name: str
    rates: tuple[float, ...]
    updates: tuple[int, ...]
    floor_lr: float | None = None

    @classmethod
    def of(cls, name: str, rates: Sequence[float], floor_lr: float | None = None) -> Curve:
        """The curve of a whole run, from update 0."""
        return cls(name, tuple(rates), tuple(range(len(rates))), floor_lr)

    def at(self, update: int) -> float | None:
        """The rate of an update; None where the curve has none."""
        place = bisect_left(self.updates, update)
        return self.rates[place] if place < len(self.updates) and self.updates[place] == update else None


@dataclass(frozen=True)
class Figures:
    """What a curve comes to. Rates are absolute; `area` is the sum of all rates.

    `half_update` and `highest_update` are the first updates at half of the highest rate and at that rate.
    `at_floor` counts the updates made at `floor_lr` or below; `area_updates` is the area in updates at the
    highest rate.
    """

    highest_lr: float
    highest_update: int
    half_update: int
    floor_lr: float
    at_floor: int
    area: float
    area_updates: float


def figures(curve: Curve) -> Figures:
    """The figures of a curve with one update or more; without a floor of its own its lowest rate counts as that."""
    highest, floor = max(curve.rates), min(curve.rates) if curve.floor_lr is None else curve.floor_lr
    area = math.fsum(curve.rates)
    return Figures(
        highest_lr=highest,
        highest_update=curve.updates[curve.rates.index(highest)],
        half_update=next(u for u, rate in zip(curve.updates, curve.rates, strict=True) if rate >= highest / 2),
        floor_lr=floor,
        # A floor that is written as a share of the peak comes out an ulp above or below.
        at_floor=sum(rate <= floor * (1 + 1e-12) for rate in curve.rates),
        area=area,
        area_updates=area / highest if highest else 0.0,
    )


def interesting(curve: Curve, marks: Mapping[int, str] | None = None) -> dict[int, str]:
    """The updates worth showing, in order, each with what it is. `marks` are further updates with their words."""
    found = figures(curve)
    total, after = len(curve.rates), curve.updates.index(found.highest_update)
    named = [(curve.updates[0], "first update"), (found.half_update, "half of the peak")]
    named.append((found.highest_update, "peak"))
    last_at_peak = curve.updates[max(i for i, rate in enumerate(curve.rates) if rate == found.highest_lr)]
    if last_at_peak > found.highest_update + 1:
        named.append((last_at_peak, "last at the peak"))
    down = next((i for i in range(after, total) if curve.rates[i] <= found.highest_lr / 2), None)
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
    """Where the segments of a schedule begin and where its warm-up was lengthened, in words."""
    named = [(segment.start, f"{segment.kind} to {segment.to_share:.3g} of the peak") for segment in schedule.segments]
    named += [(update, f"warm-up now {warmup} updates") for update, warmup in schedule.extensions]
    return _joined([(update, word) for update, word in named if update < schedule.total_updates])


def plan_marks(plan: Plan) -> dict[int, str]:
    """`schedule_marks` of a plan; none where it keeps the user's own scheduler."""
    return schedule_marks(schedule_of(plan)) if plan.learning_rate.schedule is not None else {}


def plan_curve(plan: Plan, name: str | None = None) -> Curve:
    """The rate that the plan gives every update."""
    name = name or plan.learning_rate.shape
    if plan.learning_rate.schedule is not None and plan.learning_rate.advance:
        return schedule_curve(schedule_of(plan), name)
    rate_of = planned_rates(plan)
    return Curve.of(name, [rate_of(update) for update in range(plan.length.total_updates)])


def compared(own: Curve, shapes: Sequence[str], peak_lr: float, warmup: int, total: int) -> list[Curve]:
    """The curve, and others of the same peak, warm-up and length, with the floor that each has by default."""
    others = [
        make_schedule(shape, peak_lr=peak_lr, warmup_updates=warmup, total_updates=total)
        for shape in shapes
        if shape != own.name
    ]
    return [own, *(schedule_curve(schedule) for schedule in others)]


def schedule_curve(schedule: Schedule, name: str | None = None) -> Curve:
    """The rate that the schedule gives every update."""
    floor = schedule.floor_lr if schedule.floor_lr < schedule.peak_lr else None
    return Curve.of(name or schedule.shape, lr_curve(schedule), floor)


def sparkline(rates: Sequence[float], width: int = 60) -> str:
    """The curve in one line of at most `width` characters; the highest rate is a full bar."""
    columns = min(width, len(rates))
    edges = [column * len(rates) // columns for column in range(columns + 1)]
    heights = [max(rates[a:b]) for a, b in pairwise(edges)]
    top = max(heights) or 1.0
    return "".join(BARS[max(0, math.ceil(height / top * len(BARS)) - 1)] for height in heights)


def lr_lines(plan: Plan) -> list[str]:
    """The learning rate of a plan in a few lines: what it does, a small plot, the figures, and a reason each."""
    rate, curve = plan.learning_rate, plan_curve(plan)
    found = figures(curve)
    total = plan.length.total_updates
    return [
        f"{rate.shape}: up to {rate.peak_lr:.3g} in {rate.warmup_updates} updates of warm-up, "
        f"then {curve.rates[-1]:.3g} at the last of {total}",
        sparkline(curve.rates),
        f"half of the peak at update {found.half_update}, the peak at {found.highest_update}; "
        f"as much as {found.area_updates:.3g} updates at the peak",
        *(reason_line(reason) for reason in rate.reasons),
    ]


def reason_line(reason: Reason) -> str:
    """What was chosen and why, with the range that would do; what lacks evidence says heuristic."""
    head = f"{reason.choice.replace('_', ' ')} {short(reason.value)}"
    if reason.low is not None and reason.high is not None and reason.low != reason.high:
        head += f" ({short(reason.low)} to {short(reason.high)})"
    label = " (heuristic)" if reason.heuristic else ""
    return f"{head}: {reason.reason}{label}"


def short(value: Any) -> str:
    """A number to three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
