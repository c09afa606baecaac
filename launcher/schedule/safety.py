"""Schedules that need the user's explicit consent, and warnings about existing DeepSpeed schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import Problem
from launcher.schedule.curve import Schedule
from launcher.schedule.deepspeed_schedulers import Params, replica, resolved_params, simulate_deepspeed

ALLOW = "schedule.allow_unsafe: true allows it"


@dataclass(frozen=True)
class Limit:
    """The highest safe peak learning rate for a method, for models of `parameters` or more, and why."""

    method: str
    parameters: float
    peak_lr: float
    reason: str


LIMITS = (
    Limit("full", 6e9, 5e-5, "published full fine-tuning of 6B and more uses 2e-6 to 2e-5, rarely above 5e-5"),
    Limit("full", 1e9, 3e-4, "the highest published learning rate for full fine-tuning of 1B to 6B is 3e-4"),
    Limit("full", 0, 1e-3, "the highest published learning rate for full fine-tuning of a small model is 1e-3"),
    Limit("lora", 0, 1e-3, "published LoRA recipes use 1e-4 to 3e-4, and at most 1e-3"),
    Limit(
        "preference",
        0,
        1e-5,
        "published preference tuning uses about 5e-7, and with one exception at most 1e-6",
    ),
    Limit("preference-lora", 0, 1e-4, "published preference tuning with LoRA uses about 5e-6"),
    Limit("encoder", 0, 1e-4, "published encoder recipes use 3e-6 to 5e-5"),
)
"""Within a method, from the largest models to the smallest; the first match applies."""


def peak_limit(method: str, parameters: float) -> Limit | None:
    """The limit on the peak learning rate for this method and size; None for a method without one."""
    return next((row for row in LIMITS if row.method == method and parameters >= row.parameters), None)


def check_safety(schedule: Schedule, *, method: str, parameters: float) -> list[Problem]:
    """Everything in the schedule that needs the user's explicit consent, as problems with hints."""
    checks = (_too_long, lambda s: _too_high(s.peak_lr, method, parameters))
    return [problem for check in checks if (problem := check(schedule)) is not None]


def _too_long(schedule: Schedule) -> Problem | None:
    if schedule.warmup_updates <= schedule.total_updates:
        return None
    message = (
        f"the warm-up of {schedule.warmup_updates} updates is longer than the run of "
        f"{schedule.total_updates}: the peak would never be reached"
    )
    hint = f"warm up for {max(1, schedule.total_updates // 5)} updates or fewer, or train longer; {ALLOW}"
    return Problem(message=message, key="schedule.warmup", hint=hint)


def log_ramp(schedule: Schedule) -> str | None:
    """A sentence on how steep the log warm-up of the schedule is; None if the warm-up is linear."""
    if schedule.warmup_type != "log" or schedule.warmup_updates < 2:
        return None
    return f"A log warm-up is steep at first: it {_log_ramp(schedule.warmup_updates)}."


def _log_ramp(warmup: int) -> str:
    after = min(10, warmup - 1)
    ratio = replica("WarmupLR", {"warmup_num_steps": warmup, "warmup_max_lr": 1.0}, 1.0).lr_at(after)
    return f"reaches {ratio:.0%} of the peak after {after} of {warmup} updates"


def _too_high(peak_lr: float, method: str, parameters: float) -> Problem | None:
    limit = peak_limit(method, parameters)
    if limit is None or peak_lr <= limit.peak_lr:
        return None
    message = (
        f"a peak of {peak_lr:g} is high for {method} training of {parameters / 1e9:.3g}B parameters: {limit.reason}"
    )
    return Problem(message=message, key="schedule.peak_lr", hint=f"at most {limit.peak_lr:g}; {ALLOW}")


@dataclass(frozen=True)
class _Scheduler:
    """An existing scheduler block as written and with defaults, and its run."""

    kind: str
    written: Params
    full: Params
    optimizer_lr: float
    updates: int

    def first_lrs(self, count: int) -> list[float]:
        return simulate_deepspeed(self.kind, self.written, self.optimizer_lr, count)


def unsafe_scheduler(
    scheduler_type: str, params: Params, optimizer_lr: float, updates: int, *, method: str, parameters: float
) -> list[Problem]:
    """What in the user's scheduler needs explicit consent: surprising defaults of DeepSpeed, and unsafe values.

    Raises RequestError for parameters that DeepSpeed rejects.
    """
    scheduler = _Scheduler(scheduler_type, params, resolved_params(scheduler_type, params), optimizer_lr, updates)
    default_log = None if scheduler.written.get("warmup_type") == "log" else _log_ramp_sentence(scheduler)
    sentences = {
        "warmup_type": default_log,
        "warmup_max_lr": _inherited_peak(scheduler),
        "warmup_num_steps": _beyond_the_run(scheduler),
        "total_num_steps": _beyond_the_total(scheduler),
    }
    problems = [Problem(text, key=f"scheduler.params.{key}", hint=ALLOW) for key, text in sentences.items() if text]
    high = _too_high(max(simulate_deepspeed(scheduler_type, params, optimizer_lr, updates)), method, parameters)
    return [*problems, high] if high else problems


def _negative_lrs(scheduler: _Scheduler) -> str | None:
    lowest = min(scheduler.first_lrs(scheduler.updates), default=0.0)
    if lowest >= 0:
        return None
    return f"Some updates have a learning rate below 0, down to {lowest:g}, which increases the loss."


def deepspeed_warnings(scheduler_type: str, params: Params, optimizer_lr: float, updates: int) -> list[str]:
    """Sentences on what an existing DeepSpeed scheduler block does that its author may not expect.

    For a run of `updates` without an extra `step()` at the start. Raises RequestError for parameters that DeepSpeed
    rejects.
    """
    scheduler = _Scheduler(scheduler_type, params, resolved_params(scheduler_type, params), optimizer_lr, updates)
    return [sentence for check in _CHECKS if (sentence := check(scheduler))]


def _two_at_start(scheduler: _Scheduler) -> str | None:
    if not scheduler.kind.startswith("Warmup") or scheduler.full["last_batch_iteration"] != -1 or scheduler.updates < 2:
        return None
    first, second = scheduler.first_lrs(2)
    if first == second:
        return f"Updates 0 and 1 both use {first:g}: the engine's first step does not change the learning rate."
    return f"Update 0 uses {first:g}, whatever the warm-up's minimum is; the ramp starts at update 1."


def _resumed_count(scheduler: _Scheduler) -> str | None:
    last = scheduler.full["last_batch_iteration"]
    if last == -1:
        return None
    return (
        f"last_batch_iteration is {last}: update 0 uses the optimizer's full learning rate {scheduler.optimizer_lr:g}."
    )


def _log_ramp_sentence(scheduler: _Scheduler) -> str | None:
    if not scheduler.kind.startswith("Warmup") or scheduler.full["warmup_num_steps"] <= 2:
        return None
    kind = scheduler.full["warmup_type"]
    if kind == "linear":
        return None
    origin = "is the default" if "warmup_type" not in scheduler.written else "is set"
    if kind != "log":
        origin = f"is what DeepSpeed uses for the unknown warmup_type {kind!r}"
    ramp = _log_ramp(scheduler.full["warmup_num_steps"])
    return f'The log ramp {origin}: it {ramp}. Write "warmup_type": "linear".'


def _inherited_peak(scheduler: _Scheduler) -> str | None:
    if scheduler.kind != "WarmupDecayLR" or "warmup_max_lr" in scheduler.written:
        return None
    return (
        "warmup_max_lr is missing: the peak is DeepSpeed's default 0.001, not the optimizer's "
        f"{scheduler.optimizer_lr:g}."
    )


def _other_peak(scheduler: _Scheduler) -> str | None:
    peak = scheduler.written.get("warmup_max_lr")
    if not isinstance(peak, int | float) or peak == scheduler.optimizer_lr:
        return None
    return (
        f"The peak is the scheduler's {peak:g}; the optimizer's learning rate {scheduler.optimizer_lr:g} is never used."
    )


def _beyond_the_run(scheduler: _Scheduler) -> str | None:
    warmup = scheduler.full.get("warmup_num_steps", 0)
    if warmup <= scheduler.updates:
        return None
    return f"The warm-up of {warmup} updates is longer than the run of {scheduler.updates}: it never reaches the peak."


def _beyond_the_total(scheduler: _Scheduler) -> str | None:
    if "total_num_steps" not in scheduler.full:
        return None
    total, warmup = scheduler.full["total_num_steps"], max(2, scheduler.full["warmup_num_steps"])
    if total >= warmup:
        return None
    return (
        f"total_num_steps {total} is less than the warm-up of {warmup}: the learning rate drops straight to its floor."
    )


def _other_total(scheduler: _Scheduler) -> str | None:
    total = scheduler.full.get("total_num_steps")
    if total is None or total == scheduler.updates:
        return None
    if total < scheduler.updates:
        rest = scheduler.updates - total
        return f"The decay ends at update {total}: the last {rest:g} updates are at the floor."
    last = scheduler.first_lrs(scheduler.updates)[-1]
    return f"The decay is for {total} updates, but the run has {scheduler.updates}: it ends at {last:g}."


def _idle_updates(scheduler: _Scheduler) -> str | None:
    idle = scheduler.first_lrs(scheduler.updates).count(0.0)
    return f"{idle} of {scheduler.updates} updates have a learning rate of 0 and train nothing." if idle else None


_CHECKS: tuple[Callable[[_Scheduler], str | None], ...] = (
    _two_at_start,
    _resumed_count,
    _log_ramp_sentence,
    _inherited_peak,
    _other_peak,
    _beyond_the_run,
    _beyond_the_total,
    _other_total,
    _idle_updates,
    _negative_lrs,
)
