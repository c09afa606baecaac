"""Revisions of a plan during a run: the same plan with another schedule from some update on."""

from __future__ import annotations

from typing import Any

from launcher.plan.schema import Plan
from launcher.schedule.curve import Schedule, deepspeed_blocks, extend_warmup, lower_peak


def with_longer_warmup(plan: Plan, update: int) -> Plan:
    """The plan with a longer warm-up from `update` on, in its schedule and in its DeepSpeed JSON.

    Raises RequestError if that would not lower the learning rate, ValueError if the plan has the user's own scheduler.
    """
    return with_schedule(plan, extend_warmup(schedule_of(plan), update), update)


def with_lower_peak(plan: Plan, update: int) -> Plan:
    """The plan with a longer warm-up and half the learning rate from `update` on.

    Raises ValueError if the plan has the user's own scheduler.
    """
    return with_schedule(plan, lower_peak(schedule_of(plan), update), update)


def schedule_of(plan: Plan) -> Schedule:
    """The generated schedule of a plan. Raises ValueError if the plan has the user's own scheduler."""
    if plan.learning_rate.schedule is None:
        raise ValueError("the plan has the scheduler of the user's DeepSpeed JSON, not a generated schedule")
    return Schedule.from_dict(plan.learning_rate.schedule)


def extensions(plan: Plan) -> int:
    """How often the warm-up was lengthened."""
    return len(schedule_of(plan).extensions) if plan.learning_rate.schedule is not None else 0


def with_schedule(plan: Plan, schedule: Schedule, update: int) -> Plan:
    """The plan with another schedule; its DeepSpeed JSON has the warm-up and peak that apply at `update`."""
    blocks = deepspeed_blocks(schedule, update=update)
    optimizer = plan.ds_config["optimizer"]
    config: dict[str, Any] = {
        **plan.ds_config,
        "optimizer": {**optimizer, "params": {**optimizer["params"], **blocks["optimizer"]["params"]}},
    }
    config.pop("scheduler", None)
    if blocks["scheduler"] is not None:
        config["scheduler"] = blocks["scheduler"]
    learning_rate = plan.learning_rate.model_copy(
        update={
            "schedule": schedule.to_dict(),
            "shape": schedule.shape,
            "peak_lr": schedule.peak_lr,
            "floor_lr": schedule.floor_lr,
            "warmup_updates": schedule.warmup_updates,
        }
    )
    return plan.model_copy(update={"learning_rate": learning_rate, "ds_config": config})
