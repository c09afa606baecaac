"""Revisions of a plan while it is carried out: the same plan with another schedule from some update on."""

from __future__ import annotations

from typing import Any

from launcher.plan.schema import Plan
from launcher.schedule.curve import Schedule, deepspeed_blocks, extend_warmup, lower_peak


def with_longer_warmup(plan: Plan, update: int) -> Plan:
    """The plan whose warm-up is lengthened at `update`, in its schedule and in its DeepSpeed JSON.

    Raises RequestError where that would not lower the rate, or where the plan keeps the user's own scheduler.
    """
    return with_schedule(plan, extend_warmup(schedule_of(plan), update), update)


def with_lower_peak(plan: Plan, update: int) -> Plan:
    """The plan whose warm-up is lengthened at `update`, and whose rates are half from there on.

    Raises ValueError where the plan keeps the user's own scheduler.
    """
    return with_schedule(plan, lower_peak(schedule_of(plan), update), update)


def schedule_of(plan: Plan) -> Schedule:
    """The generated schedule of a plan. Raises ValueError where it keeps the user's own scheduler."""
    if plan.learning_rate.schedule is None:
        raise ValueError("the plan keeps the scheduler of the user's own DeepSpeed JSON")
    return Schedule.from_dict(plan.learning_rate.schedule)


def extensions(plan: Plan) -> int:
    """How often the warm-up was lengthened so far."""
    return len(schedule_of(plan).extensions) if plan.learning_rate.schedule is not None else 0


def with_schedule(plan: Plan, schedule: Schedule, update: int) -> Plan:
    """The plan under another schedule, whose warm-up and peak in force at `update` stand in the DeepSpeed JSON."""
    blocks = deepspeed_blocks(schedule, update=update)
    optimizer = plan.ds_config["optimizer"]
    config: dict[str, Any] = {
        **plan.ds_config,
        "optimizer": {**optimizer, "params": {**optimizer["params"], **blocks["optimizer"]["params"]}},
    }
    if blocks["scheduler"] is not None:
        config["scheduler"] = blocks["scheduler"]
    rate = plan.learning_rate.model_copy(
        update={
            "schedule": schedule.to_dict(),
            "shape": schedule.shape,
            "peak_lr": schedule.peak_lr,
            "floor_lr": schedule.floor_lr,
            "warmup_updates": schedule.warmup_updates,
        }
    )
    return plan.model_copy(update={"learning_rate": rate, "ds_config": config})
