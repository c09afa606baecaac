"""Resuming a run: its plan from a checkpoint on, possibly with another batch, world size or schedule."""

from __future__ import annotations

from launcher.ds_config.optimizer_class import ADAM_TYPES
from launcher.errors import Problem, RequestError
from launcher.plan.revision import schedule_of, with_schedule
from launcher.plan.schema import Part, Plan, Resumed
from launcher.schedule.advice import adjusted_beta2
from launcher.schedule.curve import Schedule, lr_at
from launcher.schedule.progress import convert_updates, rescale


class Start(Part):
    """Where the ranks start: a checkpoint, and its number of updates (in the plan's batches) and samples."""

    checkpoint: str
    update: int
    samples: int
    convert: bool = False


def resumed_plan(old: Plan, new: Plan, update: int, samples: int, *, new_schedule: bool) -> Plan:
    """`new`, resumed after `update` updates and `samples` samples under `old`.

    The run keeps its length in samples. Its schedule is that of `old`, converted to the new batch: the learning rate at
    a number of samples does not change. With `new_schedule` it is that of `new`. Raises RequestError if no updates are
    left, or if the scheduler of the user's JSON prevents the change.
    """
    before, after = old.train_batch_size, new.train_batch_size
    if old.learning_rate.schedule is None and before != after:
        raise RequestError(
            Problem(
                "the DeepSpeed JSON's scheduler counts updates, and a new batch size changes their number",
                key="schedule.shape",
                hint="set a shape to generate a schedule",
            )
        )
    if old.learning_rate.schedule is not None and new.learning_rate.schedule is None:
        raise RequestError(
            Problem(
                "the run has a generated schedule, but the DeepSpeed JSON has a scheduler",
                key="deepspeed",
                hint="remove the scheduler from the JSON, or set schedule.shape",
            )
        )
    if new_schedule or old.learning_rate.schedule is None:
        return _with_new_schedule(old, new, update, samples)
    left = old.length.samples - samples
    schedule, resumed, arithmetic = rescale(
        schedule_of(old),
        done_updates=update,
        old_batch=before,
        new_batch=after,
        total_samples=update * before + left,
    )
    return _resume_at(new, schedule, resumed, samples, f"{_batch_change(old, new)} {arithmetic}")


def _with_new_schedule(old: Plan, new: Plan, update: int, samples: int) -> Plan:
    resumed = convert_updates(update, old.train_batch_size, new.train_batch_size)
    if resumed >= new.length.total_updates:
        raise RequestError(
            Problem(f"{resumed} of {new.length.total_updates} updates are already done", key="train.max_steps")
        )
    if new.learning_rate.schedule is None:
        return new.model_copy(
            update={"resumed": Resumed(update=resumed, samples=samples, arithmetic=_batch_change(old, new))}
        )
    schedule = schedule_of(new)
    sentence = f"The new schedule continues at a learning rate of {lr_at(schedule, resumed):.6g}."
    return _resume_at(new, schedule, resumed, samples, f"{_batch_change(old, new)} {sentence}")


def _resume_at(new: Plan, schedule: Schedule, resumed: int, samples: int, arithmetic: str) -> Plan:
    updates = schedule.total_updates - resumed
    length = new.length.model_copy(
        update={
            "total_updates": schedule.total_updates,
            "samples": samples + updates * new.train_batch_size,
            "refilled_samples": 0,
        }
    )
    plan = new.model_copy(
        update={"length": length, "resumed": Resumed(update=resumed, samples=samples, arithmetic=arithmetic)}
    )
    return with_schedule(plan, schedule, resumed)


def _beta2_advice(old: Plan, new: Plan) -> str:
    """A sentence on the beta2 that suits the new batch; empty if the user changed it, or the optimizer is not Adam."""
    optimizer = new.ds_config["optimizer"]
    before, now = (plan.ds_config["optimizer"]["params"].get("betas") for plan in (old, new))
    if now is None or before != now or optimizer["type"].lower() not in ADAM_TYPES:
        return ""
    suited = adjusted_beta2(now[1], old.train_batch_size, new.train_batch_size)
    return (
        f" beta2 stays {now[1]:g}: with {suited:.6g} = {now[1]:g}^({new.train_batch_size}/{old.train_batch_size}) in "
        "train.betas, Adam would average over as many tokens as before."
    )


def _batch_change(old: Plan, new: Plan) -> str:
    """A sentence about the change of ranks and batch."""
    ranks = f"{old.world.size} → {new.world.size} ranks"
    if old.train_batch_size != new.train_batch_size:
        batches = f"{ranks}, train_batch_size {old.train_batch_size} → {new.train_batch_size}."
        return f"{batches}{_beta2_advice(old, new)}"
    if (old.world.size, old.gradient_accumulation_steps) == (new.world.size, new.gradient_accumulation_steps):
        return "The ranks and the batch stay the same."
    steps = f"{old.gradient_accumulation_steps} → {new.gradient_accumulation_steps}"
    return f"{ranks}: train_batch_size stays {new.train_batch_size}, with accumulation {steps}."
