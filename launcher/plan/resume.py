"""Going on with a run: the plan from a checkpoint on, when the batch, the world size or the schedule has changed."""

from __future__ import annotations

from launcher.errors import Problem, RequestError
from launcher.plan.revision import schedule_of, with_schedule
from launcher.plan.schema import Part, Plan, Resumed
from launcher.schedule.curve import Schedule, lr_at
from launcher.schedule.progress import convert_updates, rescale


class Start(Part):
    """Where the ranks begin: a checkpoint, and the update and the samples that it stands for under the plan."""

    checkpoint: str
    update: int
    samples: int
    convert: bool = False


def continued(old: Plan, new: Plan, update: int, samples: int, *, new_schedule: bool) -> Plan:
    """`new`, going on after `update` updates and `samples` samples that were made under `old`.

    The run keeps its length in samples. Its schedule is that of `old`, converted to the new batch so that the rate at
    a number of samples stays what it was; with `new_schedule` it is the one that `new` has. Raises RequestError where
    nothing is left to do, or where the schedule is the user's own JSON.
    """
    before, after = old.train_batch_size, new.train_batch_size
    if old.learning_rate.schedule is None and before != after:
        raise RequestError(
            Problem(
                "the scheduler of the DeepSpeed JSON counts updates, and a new batch size changes what they are",
                key="schedule.shape",
                hint="name a shape, and a schedule is generated",
            )
        )
    if old.learning_rate.schedule is not None and new.learning_rate.schedule is None:
        raise RequestError(
            Problem(
                "the run has a generated schedule, and the DeepSpeed JSON brings one of its own",
                key="deepspeed",
                hint="take the scheduler out of the JSON, or name a schedule.shape",
            )
        )
    if new_schedule or old.learning_rate.schedule is None:
        return _under_its_own(old, new, update, samples)
    left = old.length.samples - samples
    schedule, resumed, arithmetic = rescale(
        schedule_of(old),
        done_updates=update,
        old_batch=before,
        new_batch=after,
        total_samples=update * before + left,
    )
    return _going_on(new, schedule, resumed, samples, f"{_batch_words(old, new)} {arithmetic}")


def _under_its_own(old: Plan, new: Plan, update: int, samples: int) -> Plan:
    resumed = convert_updates(update, old.train_batch_size, new.train_batch_size)
    if resumed >= new.length.total_updates:
        raise RequestError(
            Problem(f"{resumed} of {new.length.total_updates} updates are made already", key="train.max_steps")
        )
    if new.learning_rate.schedule is None:
        return new.model_copy(
            update={"resumed": Resumed(update=resumed, samples=samples, arithmetic=_batch_words(old, new))}
        )
    schedule = schedule_of(new)
    rate = lr_at(schedule, resumed)
    return _going_on(
        new, schedule, resumed, samples, f"{_batch_words(old, new)} The new schedule goes on at {rate:.6g}."
    )


def _going_on(new: Plan, schedule: Schedule, resumed: int, samples: int, arithmetic: str) -> Plan:
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


def _batch_words(old: Plan, new: Plan) -> str:
    """What became of the batch, in words."""
    ranks = f"{old.world.size} → {new.world.size} ranks"
    if old.train_batch_size != new.train_batch_size:
        return f"{ranks}, train_batch_size {old.train_batch_size} → {new.train_batch_size}."
    steps = f"{old.gradient_accumulation_steps} → {new.gradient_accumulation_steps}"
    return f"{ranks}: train_batch_size stays {new.train_batch_size}, with accumulation {steps}."
