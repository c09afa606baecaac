"""DeepSpeed's schedulers as plain functions of their JSON parameters.

A replica of deepspeed/runtime/lr_schedules.py (0.19.8), with its defaults, its behaviour at construction and its order
of float operations: every learning rate is bit-identical to DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem, RequestError, nearest

Params = Mapping[str, Any]
StepFunction = Callable[[int], float]
"""A value for each `last_batch_iteration` of the scheduler."""


@dataclass(frozen=True)
class Replica:
    """One scheduler on one parameter group, just after its construction."""

    initial_lr: float
    last_iteration: int
    lr_at: StepFunction

    def lr_after(self, steps: int) -> float:
        """The group's learning rate after `steps` calls of `step()`. Raises RequestError if it cannot be computed."""
        try:
            return self.initial_lr if steps == 0 else self.lr_at(self.last_iteration + steps)
        except (ZeroDivisionError, OverflowError) as error:
            message = f"the learning rate after {steps} steps cannot be computed: {error}"
            raise RequestError(Problem(message, key="scheduler.params")) from None


_WARMUP: dict[str, Any] = {"warmup_num_steps": 1000, "warmup_type": "log", "last_batch_iteration": -1}

DEFAULTS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None, **_WARMUP},
    "WarmupDecayLR": {"total_num_steps": ..., "warmup_min_lr": 0.0, "warmup_max_lr": 0.001, **_WARMUP},
    "WarmupCosineLR": {"total_num_steps": ..., "warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, **_WARMUP},
    "OneCycle": {
        "cycle_min_lr": ...,
        "cycle_max_lr": ...,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
        "last_batch_iteration": -1,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 0.001,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
        "last_batch_iteration": -1,
    },
}
"""Every parameter of every class with its default; an ellipsis marks a required one."""

_PER_GROUP = {"warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr"}
_NOT_CHECKED = {"warmup_type", "cycle_momentum", "cycle_min_mom", "cycle_max_mom", "lr_range_test_staircase"}


def _invalid(scheduler_type: str, key: str, message: str, hint: str | None = None) -> RequestError:
    return RequestError(Problem(message=f"{scheduler_type}: {message}", key=f"scheduler.params.{key}", hint=hint))


def resolved_params(scheduler_type: str, params: Params, group: int = 0) -> dict[str, Any]:
    """All parameters of the scheduler for one parameter group, defaults filled in.

    Raises RequestError for parameters on which DeepSpeed's constructor would fail.
    """
    if scheduler_type not in DEFAULTS:
        close = nearest(scheduler_type, DEFAULTS)
        hint = f"did you mean {close}?" if close else f"one of {', '.join(DEFAULTS)}"
        raise RequestError(
            Problem(f"{scheduler_type} is not one of DeepSpeed's schedulers", key="scheduler.type", hint=hint)
        )
    defaults = DEFAULTS[scheduler_type]
    for key in params:
        if key not in defaults:
            close = nearest(key, defaults)
            hint = f"did you mean {close}?" if close else f"valid parameters: {', '.join(defaults)}"
            raise _invalid(scheduler_type, key, f"unknown parameter {key!r}", hint)
    merged = {**defaults, **params}
    return {key: _checked(scheduler_type, key, value, group) for key, value in merged.items()}


def _checked(scheduler_type: str, key: str, value: Any, group: int) -> Any:
    if value is ...:
        raise _invalid(scheduler_type, key, f"{key} is required and missing")
    if key in _PER_GROUP and isinstance(value, list | tuple):
        if group >= len(value):
            message = f"{key} lists {len(value)} values, but there is a parameter group {group}"
            raise _invalid(scheduler_type, key, message, "write one value, or one per parameter group")
        value = value[group]
    if key in ("warmup_num_steps", "lr_range_test_step_size"):
        if not isinstance(value, int) or value <= 0:
            message = f"{key} must be a positive integer, found {value!r}"
            raise _invalid(scheduler_type, key, message, "write a whole number of updates, 1 or more")
    elif key not in _NOT_CHECKED and value is not DEFAULTS[scheduler_type][key]:
        _require_number(scheduler_type, key, value)
    return value


def _require_number(scheduler_type: str, key: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        hint = None
        if value == "auto":
            hint = 'DeepSpeed does not resolve "auto" here: transformers or the launcher must fill it in'
        raise _invalid(scheduler_type, key, f"{key} must be a number, found {value!r}", hint)


def replica(scheduler_type: str, params: Params, optimizer_lr: float, group: int = 0) -> Replica:
    """The scheduler that DeepSpeed would build from this JSON, for one parameter group.

    `optimizer_lr` is the group's learning rate in the optimizer before the scheduler is built. Raises RequestError for
    parameters that DeepSpeed rejects.
    """
    full = resolved_params(scheduler_type, params, group)
    start, lr_at = _BUILDERS[scheduler_type](full, optimizer_lr)
    last: int = full["last_batch_iteration"]
    return Replica(initial_lr=start if last == -1 else optimizer_lr, last_iteration=last, lr_at=lr_at)


def _ramp(full: Params) -> StepFunction:
    steps = max(2, full["warmup_num_steps"])
    if full["warmup_type"] == "linear":
        return lambda i: i / steps
    inverse_log = 1.0 / math.log(steps)
    return lambda i: inverse_log * math.log(i + 1)


def _warmup(full: Params, optimizer_lr: float) -> tuple[float, StepFunction]:
    return _warmup_then(full, optimizer_lr, lambda _: 1.0)


def _warmup_decay(full: Params, optimizer_lr: float) -> tuple[float, StepFunction]:
    total, steps = full["total_num_steps"], max(2, full["warmup_num_steps"])
    span = float(max(1.0, total - steps))
    return _warmup_then(full, optimizer_lr, lambda i: max(0.0, float(total - i) / span))


def _warmup_then(full: Params, optimizer_lr: float, decay: StepFunction) -> tuple[float, StepFunction]:
    low = full["warmup_min_lr"]
    high = optimizer_lr if full["warmup_max_lr"] is None else full["warmup_max_lr"]
    delta, steps, ramp = high - low, max(2, full["warmup_num_steps"]), _ramp(full)

    def lr_at(i: int) -> float:
        if i < 0:
            return float(low)
        return float(low + (delta * (ramp(i) if i < steps else decay(i))))

    return float(low), lr_at


def _warmup_cosine(full: Params, optimizer_lr: float) -> tuple[float, StepFunction]:
    total, steps, ramp = full["total_num_steps"], max(2, full["warmup_num_steps"]), _ramp(full)
    low, floor, span = full["warmup_min_ratio"], full["cos_min_ratio"], max(1, total - steps)

    def ratio(i: int) -> float:
        if i < steps:
            return float(low + ramp(i) * (1.0 - low))
        cosine = (1 + math.cos(math.pi * min(1.0, (i - steps + 1) / span))) / 2
        return float(max(0.0, floor + (1.0 - floor) * cosine))

    return 0.0, lambda i: 0.0 if i < 0 else optimizer_lr * ratio(i)


def _one_cycle(full: Params, _: float) -> tuple[float, StepFunction]:
    low, high = full["cycle_min_lr"], full["cycle_max_lr"]
    scale, total = _cycle_scale(full)
    interval, decay_rate = full["decay_step_size"], full["decay_lr_rate"]
    flat = math.isclose(interval, 0) or math.isclose(decay_rate, 0)

    def lr_at(i: int) -> float:
        if i < total:
            return float(low + (high - low) * scale(i + 1))
        return float(low if flat else low / (1 + decay_rate * ((i - total + 1) / interval)))

    return float(low), lr_at


def _cycle_scale(full: Params) -> tuple[StepFunction, float]:
    first = float(full["cycle_first_step_size"])
    second = first if full["cycle_second_step_size"] is None else float(full["cycle_second_step_size"])
    if first <= 0 or second < 0:
        raise _invalid("OneCycle", "cycle_first_step_size", "the halves of the cycle must be positive")
    total, stairs_up = first + second, full["cycle_first_stair_count"]
    stairs_down = stairs_up if full["cycle_second_stair_count"] is None else full["cycle_second_stair_count"]
    turn = first / total

    def scale(batch: int) -> float:
        x = 1.0 + batch / total - math.floor(1 + batch / total)
        stairs = stairs_up if x <= turn else stairs_down
        if stairs > 0:
            return _stair(batch % total, first, second, stairs)
        return x / turn if x <= turn else (x - 1) / (turn - 1)

    return scale, total


def _stair(position: float, first: float, second: float, stairs: int) -> float:
    if position <= first:
        return math.floor(position * stairs / first) / stairs
    return math.floor((first + second - position) * stairs / second) / stairs


def _range_test(full: Params, _: float) -> tuple[float, StepFunction]:
    low, size, growth = (full[f"lr_range_test_{key}"] for key in ("min_lr", "step_size", "step_rate"))

    def lr_at(i: int) -> float:
        interval = float(i + 1) / size
        return float(low * (1 + growth * (math.floor(interval) if full["lr_range_test_staircase"] else interval)))

    return float(low), lr_at


_BUILDERS: dict[str, Callable[[Params, float], tuple[float, StepFunction]]] = {
    "WarmupLR": _warmup,
    "WarmupDecayLR": _warmup_decay,
    "WarmupCosineLR": _warmup_cosine,
    "OneCycle": _one_cycle,
    "LRRangeTest": _range_test,
}


def simulate_deepspeed(
    scheduler_type: str,
    params: Params,
    optimizer_lr: float,
    updates: int,
    extra_steps: int = 0,
    group: int = 0,
) -> list[float]:
    """The learning rate of each of the first `updates` updates under a DeepSpeed JSON.

    The engine steps the scheduler after an update, so update 0 uses the value of the constructor. `extra_steps`: calls
    of `step()` before training. Lists in `params` have one value per parameter group. Raises RequestError for
    parameters that DeepSpeed rejects.
    """
    scheduler = replica(scheduler_type, params, optimizer_lr, group)
    return [scheduler.lr_after(update + extra_steps) for update in range(updates)]
