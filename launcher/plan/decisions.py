"""A job's decisions about its DeepSpeed JSON, in DeepSpeed's terms."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.ds_config import Decisions
from launcher.plan.batch import BatchSizes
from launcher.plan.inputs import J, PlanInputs


def decisions_of(inputs: PlanInputs[J], batch: BatchSizes, *, optimizer_lr: float, **others: Any) -> Decisions:
    """The decisions that follow from the job's keys; `others` are the remaining fields of Decisions."""
    train = inputs.job.train
    params = {"lr": optimizer_lr, "betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay}
    return Decisions(
        **asdict(batch),
        precision=inputs.precision,
        device=inputs.world.device,
        optimizer={"type": "AdamW", "params": params},
        gradient_clipping=train.gradient_clipping,
        **others,
    )
