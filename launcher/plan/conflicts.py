"""Contradictions between a job and its DeepSpeed JSON, found before model and data are measured."""

from __future__ import annotations

from launcher.ds_config import auto_scheduler, compose, scheduler_of
from launcher.job import Job
from launcher.plan.batch import BatchSizes
from launcher.plan.decisions import decisions_of
from launcher.plan.inputs import PlanInputs
from launcher.plan.learning_rate import check_unused_keys

_ANY_LR, _ANY_LENGTH, _ANY_WIDTH = 1e-5, 1000, 1024
"""Placeholders for values that are decided later. Only keys that the user set are compared."""


def check_conflicts(inputs: PlanInputs[Job], batch: BatchSizes) -> None:
    """Raises RequestError for each value that the job and the JSON set differently, and for other errors of compose."""
    job, user, explicit = inputs.job, inputs.ds_config, inputs.explicit
    written = scheduler_of(user)
    if written is not None and auto_scheduler(user) is None and "schedule.shape" not in explicit:
        check_unused_keys(inputs, written["type"], written["params"])
    lr = _ANY_LR if job.schedule.peak_lr == "auto" else job.schedule.peak_lr
    length = job.train.max_steps or _ANY_LENGTH
    warmup = {"warmup_num_steps": 1, "warmup_min_lr": 0.0, "warmup_max_lr": lr, "warmup_type": "linear"}
    if user.get("scheduler.params.cos_min_ratio") == "auto":
        warmup["cos_min_ratio"] = 0.0
    compose(
        user,
        decisions_of(
            inputs,
            batch,
            optimizer_lr=lr,
            scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": length, **warmup}},
            hidden_size=_ANY_WIDTH,
            # The number of warm-up updates depends on the data.
            explicit=explicit - {"schedule.warmup"},
            total_num_steps=length,
        ),
    )
