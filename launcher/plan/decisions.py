"""What a job decides about its DeepSpeed JSON, in the JSON's own terms."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.ds_config import Decisions
from launcher.ds_config.facts import Precision
from launcher.job import Job
from launcher.plan.batch import BatchSizes
from launcher.plan.schema import World


def decisions_of(
    job: Job, world: World, precision: Precision, batch: BatchSizes, *, optimizer_lr: float, **others: Any
) -> Decisions:
    """The decisions that follow from the job's own keys; `others` are Decisions' remaining ones."""
    train = job.train
    params = {"lr": optimizer_lr, "betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay}
    return Decisions(
        **asdict(batch),
        precision=precision,
        device=world.device,
        optimizer={"type": "AdamW", "params": params},
        gradient_clipping=train.gradient_clipping,
        **others,
    )
