"""The global gradient norm of an update: ours where DeepSpeed keeps none, else the one that DeepSpeed computed."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import RunFailed
from launcher.plan.schema import Plan


def norm_before_step(engine: Any, plan: Plan) -> float | None:
    """The norm before clipping of the averaged gradients, where they are whole on every rank before the step.

    That is float32 without ZeRO, for which DeepSpeed computes none. Else None: gradients are partitioned, in buffers of
    DeepSpeed's, or a single rank's own until the step.
    """
    if plan.zero_stage != 0 or plan.precision != "fp32":
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def norm_of_step(engine: Any, plan: Plan) -> float | None:
    """The norm before clipping that DeepSpeed computed in the step just made; the same on every rank.

    None where the JSON switches it off. Raises RunFailed where DeepSpeed has none all the same: without it the spike
    guard would see half of what it watches, and a NaN in the gradients would go unnoticed.
    """
    norm = engine.get_global_grad_norm()
    if norm is not None:
        return float(norm)
    if not engine.zero_compute_grad_norm():
        return None
    raise RunFailed(
        f"DeepSpeed reports no gradient norm for its {type(engine.optimizer).__name__}: this launcher reads the one of "
        f"DeepSpeed {plan.machine.versions.get('deepspeed', '')}, and another one may keep it elsewhere"
    )
