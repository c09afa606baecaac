"""What a run trains, as the learning-rate advice needs it."""

from __future__ import annotations

from typing import Any

from launcher.ds_config import optimizer_of
from launcher.job.schema import LoraSection
from launcher.plan.facts import ModelFacts
from launcher.plan.inputs import J, PlanInputs
from launcher.schedule.advice import Situation


def situation_of(
    inputs: PlanInputs[J],
    model: ModelFacts | None,
    lora: LoraSection | None,
    total_updates: int,
    *,
    tokens_per_update: float | None = None,
    dataset_samples: int | None = None,
) -> Situation:
    """The situation of a run; without a model it is that of a small one, whose peak the user sets."""
    return Situation(
        parameters=model.parameters if model else 1,
        method="full" if lora is None else "lora",
        tokens_per_update=tokens_per_update,
        total_updates=total_updates,
        dataset_samples=dataset_samples,
        beta2=_beta2(inputs),
        task=inputs.job.schedule.task,
        model_type=model.model_type if model else None,
        vocab_size=model.vocab_size if model else None,
        lora_alpha=lora.effective_alpha if lora else None,
    )


def _beta2(inputs: PlanInputs[J]) -> float:
    """Adam's beta2: that of the DeepSpeed JSON if it has one, else the job's."""
    optimizer: dict[str, Any] = optimizer_of(inputs.ds_config) or {}
    betas = optimizer.get("params", {}).get("betas")
    written = betas[1] if isinstance(betas, list) and len(betas) == 2 else None
    if isinstance(written, int | float) and not isinstance(written, bool) and 0 <= written < 1:
        return float(written)
    return inputs.job.train.betas[1]
