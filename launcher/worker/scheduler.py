"""The engine's learning-rate scheduler: DeepSpeed's own class if it has one, else an object that follows the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.plan.revision import schedule_of
from launcher.plan.schema import Plan
from launcher.schedule.curve import Schedule, deepspeed_class, live_attributes, lr_at


class PlannedLR:
    """A scheduler for schedules that DeepSpeed has no class for, with the same interface as DeepSpeed's own.

    Update u is made with `last_batch_iteration` = u; the state is only that number.
    """

    def __init__(self, optimizer: Any, schedule: Schedule) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.last_batch_iteration = -1
        self._apply(0)

    def get_lr(self) -> list[float]:
        rate = lr_at(self.schedule, max(0, self.last_batch_iteration))
        return [rate] * len(self.optimizer.param_groups)

    def get_last_lr(self) -> list[float]:
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advances by one update, or to the given one."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply(self.last_batch_iteration)

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]

    def _apply(self, update: int) -> None:
        self._last_lr = [lr_at(self.schedule, update)] * len(self.optimizer.param_groups)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def client_scheduler(plan: Plan) -> Callable[[Any], PlannedLR] | None:
    """The lr_scheduler argument of `deepspeed.initialize`; None if the JSON names a class of DeepSpeed."""
    if plan.learning_rate.schedule is None or deepspeed_class(schedule := schedule_of(plan)) is not None:
        return None
    return lambda optimizer: PlannedLR(optimizer, schedule)


def begin(engine: Any, plan: Plan) -> None:
    """Brings a new engine's scheduler to update 0 of the plan: DeepSpeed would stay two updates at the start."""
    for _ in range(plan.learning_rate.advance):
        engine.lr_scheduler.step()


def follow(engine: Any, plan: Plan, update: int) -> None:
    """Switches the scheduler to the plan's schedule, which was changed at `update`, without advancing it."""
    schedule, live = schedule_of(plan), engine.lr_scheduler
    if isinstance(live, PlannedLR):
        live.schedule = schedule
    else:
        for name, value in live_attributes(schedule, update, len(live.get_last_lr())).items():
            setattr(live, name, value)
    live.step(live.last_batch_iteration)


def resume(engine: Any) -> None:
    """Recomputes the learning rate after loading a checkpoint: DeepSpeed keeps the saved one."""
    engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
