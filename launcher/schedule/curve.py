"""The learning rate of every update: schedules as data, and their maths.

An update is one optimizer step, counted from 0; `lr_at(schedule, update)` is its learning rate. Linear, cosine and
constant schedules are DeepSpeed's classes, with the JSON from `deepspeed_blocks`. DeepSpeed has no class for the
others, nor for a linear schedule that ends below its first learning rate: they consist of segments.

DeepSpeed uses the starting learning rate for two updates, because its first step repeats the value of the constructor.
A fresh run therefore calls `lr_scheduler.step()` once after `deepspeed.initialize`; at update u, `last_batch_iteration`
is then u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.schedule.deepspeed_schedulers import Replica, replica
from launcher.schedule.segments import SEGMENT_SHAPES, Segment, build_segments, fraction_at, linear_segments

DEEPSPEED_TYPES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR"}
SHAPES = (*DEEPSPEED_TYPES, *SEGMENT_SHAPES)
DEFAULT_FLOORS = {"cosine": 0.1, "cosine_restarts": 0.1, "wsd": 0.0}
"""The default floor as a fraction of the peak; for linear it follows from the warm-up."""


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule, resolved to numbers.

    `start_lr` is the learning rate of update 0, `floor_lr` the one at the end of the decay; both are absolute.
    `segments` are the curve after the warm-up for schedules that DeepSpeed has no class for. `extensions`: (update,
    new warm-up) for each time that the warm-up was lengthened during the run. `halvings`: the updates at which the
    learning rate was halved.
    """

    shape: str
    peak_lr: float
    warmup_updates: int
    total_updates: int
    floor_lr: float
    start_lr: float
    warmup_type: str = "linear"
    segments: tuple[Segment, ...] = ()
    extensions: tuple[tuple[int, int], ...] = ()
    halvings: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON types; `from_dict` restores it."""
        plain = asdict(self)
        plain["segments"] = [asdict(segment) for segment in self.segments]
        plain["extensions"] = [list(pair) for pair in self.extensions]
        plain["halvings"] = list(self.halvings)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` wrote; raises RequestError if keys are unknown or missing."""
        known = {field.name for field in fields(cls)}
        if set(plain) != known:
            odd = ", ".join(sorted(set(plain) ^ known))
            raise RequestError(Problem(f"not a schedule: unknown or missing {odd}"))
        data = dict(plain)
        data["segments"] = tuple(Segment(**segment) for segment in plain["segments"])
        data["extensions"] = tuple((update, warmup) for update, warmup in plain["extensions"])
        data["halvings"] = tuple(plain["halvings"])
        return cls(**data)


def make_schedule(
    shape: str,
    *,
    peak_lr: float,
    warmup_updates: int,
    total_updates: int,
    floor: float | None = None,
    warmup_type: str = "linear",
    **options: Any,
) -> Schedule:
    """The schedule of one run; raises RequestError, with the key, for invalid settings.

    `floor` is the learning rate at the end of the decay, as a fraction of the peak. Default: 0.1 for cosine and
    cosine_restarts, 0 for wsd. WarmupDecayLR has one minimum for both of its ends, so a linear schedule ends by default
    at the learning rate of its first update, peak/(W+1); one with a lower floor consists of a segment.

    The ramp is peak·(u+1)/(W+1) up to update W, which is at the peak. WarmupCosineLR is by then one update into its
    decay; with W = 0 it stays at the peak for updates 0 and 1. A linear schedule with W = 1 has its peak at updates 1
    and 2. `check_safety` reports a warm-up longer than the run.

    Options by shape; a position is an update (integer) or a fraction of the run (a float up to 1):
    - step: decay_at (positions), decay_factor (0.1, or one per position);
    - wsd: decay_start (0.8), decay ("linear" or "1-sqrt");
    - cosine_restarts: cycles (2);
    - compound: segments, each {"kind": linear | cosine | constant | 1-sqrt, "until": position, "to": fraction}.
    """
    _check_numbers(shape, peak_lr, warmup_updates, total_updates, floor, warmup_type)
    if shape in DEEPSPEED_TYPES and options:
        raise _unknown_option(shape, next(iter(options)))
    fraction = DEFAULT_FLOORS.get(shape, 0.0) if floor is None else floor
    segments: tuple[Segment, ...] = ()
    if shape in SEGMENT_SHAPES:
        segments = build_segments(shape, warmup_updates, total_updates, fraction, options)
        fraction = segments[-1].to_share if segments else fraction
    elif shape == "linear" and floor is not None and _below_start(floor, warmup_updates):
        segments = linear_segments(warmup_updates, total_updates, floor)
    start, floor_lr = peak_lr / (warmup_updates + 1), peak_lr if shape == "constant" else peak_lr * fraction
    if shape == "linear" and not segments:
        start = floor_lr = _linear_floor(peak_lr, warmup_updates, total_updates, floor)
    return Schedule(shape, peak_lr, warmup_updates, total_updates, floor_lr, start, warmup_type, segments=segments)


def _problem(key: str, message: str, hint: str | None = None) -> RequestError:
    return RequestError(Problem(message=message, key=f"schedule.{key}", hint=hint))


def _unknown_option(shape: str, option: str) -> RequestError:
    return _problem(option, f"a {shape} schedule has no {option}", "remove it, or choose a shape that has it")


def _check_numbers(shape: str, peak_lr: float, warmup: int, total: int, floor: float | None, warmup_type: str) -> None:
    if shape not in SHAPES:
        close = nearest(shape, SHAPES)
        raise _problem("shape", f"unknown shape {shape!r}", f"did you mean {close}?" if close else " | ".join(SHAPES))
    if not _is_number(peak_lr) or peak_lr <= 0:
        raise _problem("peak_lr", f"the peak learning rate must be above 0, found {peak_lr!r}", "for example 1e-5")
    if not _is_count(total, least=1):
        raise _problem("total_updates", f"a run needs 1 update or more, found {total!r}")
    if not _is_count(warmup, least=0):
        raise _problem("warmup", f"the warm-up must be a whole number of updates, 0 or more, found {warmup!r}")
    if warmup_type not in ("linear", "log"):
        raise _problem(
            "warmup_type", f"unknown warm-up type {warmup_type!r}", "linear (gentle) or log (steep at first)"
        )
    if floor is not None and not (_is_number(floor) and 0 <= floor <= 1):
        message = f"the floor is a fraction of the peak, from 0 to 1, found {floor!r}"
        raise _problem("floor", message, "0.1 decays to a tenth of the peak")
    if floor is not None and shape in ("constant", "step", "compound"):
        raise _problem("floor", f"a {shape} schedule has no floor", "its end follows from its other settings")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _below_start(floor: float, warmup: int) -> bool:
    """Whether a floor is below the first learning rate of the warm-up, as WarmupDecayLR's cannot be."""
    return floor * (warmup + 1) < 1 and not math.isclose(floor * (warmup + 1), 1)


def _linear_floor(peak_lr: float, warmup: int, total: int, floor: float | None) -> float:
    """The one minimum of WarmupDecayLR."""
    if warmup == 0 and total > 1:
        message = "a linear decay without a warm-up would stay at its peak: WarmupDecayLR ends at its starting value"
        raise _problem("warmup", message, "warm up for 1 update or more, set a floor such as 0, or use cosine or wsd")
    start = peak_lr / (warmup + 1)
    if floor is None or math.isclose(floor * peak_lr, start):
        return start
    return max(start, floor * peak_lr)


def deepspeed_class(schedule: Schedule) -> str | None:
    """DeepSpeed's class for a schedule; None if it has none, so that the engine needs a scheduler object."""
    return None if schedule.segments else DEEPSPEED_TYPES.get(schedule.shape)


def warmup_at(schedule: Schedule, update: int) -> int:
    """The length of the warm-up in updates, as of this update."""
    return next((w for since, w in reversed(schedule.extensions) if since <= update), schedule.warmup_updates)


def halving_factor(schedule: Schedule, update: int) -> float:
    """The factor of all halvings up to this update: 1, ½, ¼, …"""
    # Halving is exact in binary: DeepSpeed with halved parameters gives exactly half the learning rate.
    return float(0.5 ** sum(since <= update for since in schedule.halvings))


def effective_schedule(schedule: Schedule, update: int) -> Schedule:
    """The schedule as of this update, with extensions and halvings folded into its numbers."""
    factor = halving_factor(schedule, update)
    return replace(
        schedule,
        peak_lr=schedule.peak_lr * factor,
        start_lr=schedule.start_lr * factor,
        floor_lr=schedule.floor_lr * factor,
        warmup_updates=warmup_at(schedule, update),
        extensions=(),
        halvings=(),
    )


def lr_at(schedule: Schedule, update: int, base_lr: float | None = None) -> float:
    """The learning rate of update `update`, counted from 0.

    `base_lr` is the learning rate of a parameter group in the optimizer. Only cosine uses it (WarmupCosineLR scales
    each group's learning rate); all other shapes give every group the same learning rate. After the run the learning
    rate stays at the end of the decay, as in DeepSpeed, whose engine steps the scheduler once more after the last
    update. Raises RequestError for a negative update.
    """
    if update < 0:
        raise _problem("total_updates", f"updates count from 0, found update {update}")
    return halving_factor(schedule, update) * _lr_without_halvings(schedule, update, base_lr)


def _lr_without_halvings(schedule: Schedule, update: int, base_lr: float | None) -> float:
    """The learning rate without the halvings."""
    warmup = warmup_at(schedule, update)
    if deepspeed_class(schedule) is not None:
        return _deepspeed(schedule, warmup, base_lr).lr_at(update)
    if update < warmup:
        gamma = _ramp(schedule.warmup_type, warmup, update)
        return schedule.start_lr + (schedule.peak_lr - schedule.start_lr) * gamma
    return schedule.peak_lr * fraction_at(schedule.segments, update, warmup, schedule.total_updates)


def lr_curve(schedule: Schedule) -> list[float]:
    """The learning rate of every update, in order."""
    return [lr_at(schedule, update) for update in range(schedule.total_updates)]


def _ramp(warmup_type: str, warmup: int, update: int) -> float:
    return update / warmup if warmup_type == "linear" else math.log(update + 1) / math.log(max(2, warmup))


@lru_cache(maxsize=64)
def _deepspeed(schedule: Schedule, warmup: int, base_lr: float | None) -> Replica:
    kind = DEEPSPEED_TYPES[schedule.shape]
    optimizer_lr = schedule.peak_lr if base_lr is None else base_lr
    return replica(kind, _params(schedule, warmup), optimizer_lr)


def _params(schedule: Schedule, warmup: int) -> dict[str, Any]:
    params: dict[str, Any] = _warmup_params(schedule, warmup)
    if schedule.shape != "constant":
        params = {"total_num_steps": schedule.total_updates, **params}
    if schedule.shape == "cosine":
        ratios = {"warmup_min_ratio": _fraction(schedule.start_lr, schedule)}
        return {**params, **ratios, "cos_min_ratio": _fraction(schedule.floor_lr, schedule)}
    return {**params, "warmup_min_lr": schedule.start_lr, "warmup_max_lr": schedule.peak_lr}


def _warmup_params(schedule: Schedule, warmup: int) -> dict[str, Any]:
    # DeepSpeed's shortest ramp has two updates. Its log ramp of two is start, peak: exactly a warm-up of one. Without a
    # warm-up the ramp does not matter: its start is the peak.
    kind = "log" if warmup == 1 else schedule.warmup_type
    return {"warmup_num_steps": max(2, warmup), "warmup_type": kind}


def _fraction(lr: float, schedule: Schedule) -> float:
    # Fifteen digits drop the rounding error of the division: 0.1 stays 0.1.
    return float(f"{lr / schedule.peak_lr:.15g}")


def deepspeed_blocks(schedule: Schedule, optimizer_type: str = "AdamW", *, update: int = 0) -> dict[str, Any]:
    """The "optimizer" and "scheduler" blocks of a DeepSpeed JSON for this schedule.

    Both contain the peak. "scheduler" is None for a schedule that DeepSpeed has no class for. The blocks are for a run
    that starts at `update`, with extensions and halvings up to there.
    """
    schedule = effective_schedule(schedule, update)
    optimizer = {"type": optimizer_type, "params": {"lr": schedule.peak_lr}}
    kind = deepspeed_class(schedule)
    if kind is None:
        return {"optimizer": optimizer, "scheduler": None}
    params = _params(schedule, schedule.warmup_updates)
    return {"optimizer": optimizer, "scheduler": {"type": kind, "params": params}}


def live_attributes(schedule: Schedule, update: int, groups: int = 1) -> dict[str, Any]:
    """The attributes to set on a live DeepSpeed scheduler for it to follow this schedule from `update` on.

    `groups` is the number of the optimizer's parameter groups; after a halving, all groups have the same learning rate.
    With the attributes set, `scheduler.step(update)` recomputes the learning rate without advancing.
    """
    params = _warmup_params(schedule, warmup_at(schedule, update))
    lrs = _live_lrs(effective_schedule(schedule, update), groups) if schedule.halvings else {}
    return {**params, **lrs, "inverse_log_warm_up": 1.0 / math.log(params["warmup_num_steps"])}


def _live_lrs(schedule: Schedule, groups: int) -> dict[str, list[float]]:
    if schedule.shape == "cosine":
        return {"org_lrs": [schedule.peak_lr] * groups}
    low, high = schedule.start_lr, schedule.peak_lr
    return {"min_lrs": [low] * groups, "max_lrs": [high] * groups, "delta_lrs": [high - low] * groups}


def extend_warmup(schedule: Schedule, update: int) -> Schedule:
    """The schedule with its warm-up lengthened at `update`: W' = 2·max(update, W), at most half the run.

    The learning rate drops to about half and climbs again; `start_lr` and the end of the decay stay. Raises
    RequestError if that does not lower the learning rate of this update, because it is too late in the run.
    """
    warmup = min(2 * max(update, warmup_at(schedule, update)), schedule.total_updates // 2)
    longer = replace(schedule, extensions=(*schedule.extensions, (update, warmup)))
    if warmup <= warmup_at(schedule, update) or lr_at(longer, update) >= lr_at(schedule, update):
        message = f"at update {update} of {schedule.total_updates} a longer warm-up would not lower the learning rate"
        raise _problem("on_spike", message, "stop the run and start another one with a lower peak learning rate")
    return longer


def lower_peak(schedule: Schedule, update: int) -> Schedule:
    """The schedule with a longer warm-up, as from `extend_warmup`, and the learning rate halved from `update` on.

    The ramp then leads to half the peak that was too high. If it is too late in the run for a longer warm-up, only the
    learning rate is halved.
    """
    try:
        longer = extend_warmup(schedule, update)
    except RequestError:
        longer = replace(schedule, extensions=(*schedule.extensions, (update, warmup_at(schedule, update))))
    return replace(longer, halvings=(*schedule.halvings, update))
