"""What a schedule must not do without the user's word, and what an existing DeepSpeed JSON really does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import Problem
from launcher.schedule.curve import Schedule
from launcher.schedule.deepspeed_schedulers import Params, replica, settled, simulate_deepspeed

ALLOW = "schedule.allow_unsafe: true runs it all the same"


@dataclass(frozen=True)
class Limit:
    """The highest peak rate for models of one method from a number of parameters on, and why."""

    method: str
    parameters: float
    peak_lr: float
    reason: str


LIMITS = (
    Limit("full", 6e9, 5e-5, "full fine-tuning of 6B and more is published at 2e-6 to 2e-5, rarely above 5e-5"),
    Limit("full", 1e9, 3e-4, "the highest published rate for full fine-tuning of 1B to 6B is 3e-4"),
    Limit("full", 0, 1e-3, "the highest published rate for full fine-tuning of a small model is 1e-3"),
    Limit("lora", 0, 1e-3, "LoRA is published at 1e-4 to 3e-4, and at 1e-3 at most"),
    Limit(
        "preference",
        0,
        1e-5,
        "preference tuning is published near 5e-7, and at 1e-6 at most but for one example",
    ),
    Limit("preference-lora", 0, 1e-4, "preference tuning with LoRA is published near 5e-6"),
    Limit("encoder", 0, 1e-4, "encoders are published at 3e-6 to 5e-5"),
)
"""For each method the rows stand from the largest models down; the first that applies counts."""


def peak_limit(method: str, parameters: float) -> Limit | None:
    """The limit on the peak rate for this method and size; None for a method without one."""
    return next((row for row in LIMITS if row.method == method and parameters >= row.parameters), None)


def check_safety(schedule: Schedule, *, method: str, parameters: float) -> list[Problem]:
    """Everything about the schedule that needs the user's explicit word, as problems with their hints."""
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
    """What a log warm-up, which the user asked for, does at first; None where the warm-up is linear."""
    if schedule.warmup_type != "log" or schedule.warmup_updates < 2:
        return None
    return f"A log warm-up is steep at first: it {_log_ramp(schedule.warmup_updates)}."


def _log_ramp(warmup: int) -> str:
    after = min(10, warmup - 1)
    ratio = replica("WarmupLR", {"warmup_num_steps": warmup, "warmup_max_lr": 1.0}, 1.0).rate(after)
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
class _Case:
    """An existing scheduler block: as written, with its defaults, and the run that it is in."""

    kind: str
    written: Params
    full: Params
    optimizer_lr: float
    updates: int

    def first_rates(self, count: int) -> list[float]:
        return simulate_deepspeed(self.kind, self.written, self.optimizer_lr, count)


def unsafe_scheduler(
    scheduler_type: str, params: Params, optimizer_lr: float, updates: int, *, method: str, parameters: float
) -> list[Problem]:
    """What of a user's own scheduler needs the user's explicit word: what DeepSpeed put in unasked, and what is unsafe.

    Raises RequestError for parameters that DeepSpeed refuses.
    """
    case = _Case(scheduler_type, params, settled(scheduler_type, params), optimizer_lr, updates)
    unasked_log = None if case.written.get("warmup_type") == "log" else _log_ramp_sentence(case)
    told = {
        "warmup_type": unasked_log,
        "warmup_max_lr": _inherited_peak(case),
        "warmup_num_steps": _beyond_the_run(case),
        "total_num_steps": _beyond_the_total(case),
    }
    problems = [Problem(text, key=f"scheduler.params.{key}", hint=ALLOW) for key, text in told.items() if text]
    high = _too_high(max(simulate_deepspeed(scheduler_type, params, optimizer_lr, updates)), method, parameters)
    return [*problems, high] if high else problems


def _below_zero(case: _Case) -> str | None:
    lowest = min(case.first_rates(case.updates), default=0.0)
    if lowest >= 0:
        return None
    return f"Updates run at learning rates below 0, down to {lowest:g}, which increase the loss."


def deepspeed_warnings(scheduler_type: str, params: Params, optimizer_lr: float, updates: int) -> list[str]:
    """What an existing DeepSpeed scheduler block will do that its author may not expect, as plain sentences.

    For a run of `updates` started as the engine starts it. Raises RequestError for parameters that DeepSpeed
    refuses.
    """
    case = _Case(scheduler_type, params, settled(scheduler_type, params), optimizer_lr, updates)
    return [sentence for check in _CHECKS if (sentence := check(case))]


def _two_at_start(case: _Case) -> str | None:
    if not case.kind.startswith("Warmup") or case.full["last_batch_iteration"] != -1 or case.updates < 2:
        return None
    first, second = case.first_rates(2)
    if first == second:
        return f"Updates 0 and 1 both run at {first:g}: the engine's first step leaves the rate as it was."
    return f"Update 0 runs at {first:g} whatever the warm-up's minimum is; the ramp starts at update 1."


def _resumed_count(case: _Case) -> str | None:
    last = case.full["last_batch_iteration"]
    if last == -1:
        return None
    return f"last_batch_iteration is {last}: update 0 runs at the optimizer's full rate {case.optimizer_lr:g}."


def _log_ramp_sentence(case: _Case) -> str | None:
    if not case.kind.startswith("Warmup") or case.full["warmup_num_steps"] <= 2:
        return None
    kind = case.full["warmup_type"]
    if kind == "linear":
        return None
    why = "is the default" if "warmup_type" not in case.written else "is set"
    if kind != "log":
        why = f"is what DeepSpeed makes of the unknown warmup_type {kind!r}"
    ramp = _log_ramp(case.full["warmup_num_steps"])
    return f'The log ramp {why}: it {ramp}. Write "warmup_type": "linear".'


def _inherited_peak(case: _Case) -> str | None:
    if case.kind != "WarmupDecayLR" or "warmup_max_lr" in case.written:
        return None
    return (
        "warmup_max_lr is missing, so the peak is DeepSpeed's default 0.001, and not the optimizer's "
        f"{case.optimizer_lr:g}."
    )


def _other_peak(case: _Case) -> str | None:
    peak = case.written.get("warmup_max_lr")
    if not isinstance(peak, int | float) or peak == case.optimizer_lr:
        return None
    return f"The scheduler's peak {peak:g} rules; the optimizer's rate {case.optimizer_lr:g} is never used."


def _beyond_the_run(case: _Case) -> str | None:
    warmup = case.full.get("warmup_num_steps", 0)
    if warmup <= case.updates:
        return None
    return f"The warm-up of {warmup} updates exceeds the run of {case.updates}: it never reaches the peak."


def _beyond_the_total(case: _Case) -> str | None:
    if "total_num_steps" not in case.full:
        return None
    total, warmup = case.full["total_num_steps"], max(2, case.full["warmup_num_steps"])
    if total >= warmup:
        return None
    return f"total_num_steps {total} is less than the warm-up of {warmup}: the rate drops straight to its floor."


def _other_total(case: _Case) -> str | None:
    total = case.full.get("total_num_steps")
    if total is None or total == case.updates:
        return None
    if total < case.updates:
        idle = case.updates - total
        return f"The decay ends at update {total}: the last {idle:g} updates run at the floor."
    last = case.first_rates(case.updates)[-1]
    return f"The decay is laid out for {total} updates and the run has {case.updates}: it ends at {last:g}."


def _idle_updates(case: _Case) -> str | None:
    idle = case.first_rates(case.updates).count(0.0)
    return f"{idle} of {case.updates} updates run at rate 0 and train nothing." if idle else None


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _two_at_start,
    _resumed_count,
    _log_ramp_sentence,
    _inherited_peak,
    _other_peak,
    _beyond_the_run,
    _beyond_the_total,
    _other_total,
    _idle_updates,
    _below_zero,
)
