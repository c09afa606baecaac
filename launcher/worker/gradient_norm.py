"""The global gradient norm of an update: from DeepSpeed, or computed here where DeepSpeed computes none."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import RunFailed
from launcher.plan.schema import Plan


def norm_before_step(engine: Any, plan: Plan) -> float | None:
    """The norm, before clipping, of the averaged gradients if every rank has all of them before the step.

    That is the case for float32 without ZeRO, where DeepSpeed computes no norm. Otherwise None: until the step, the
    gradients are partitioned, in DeepSpeed's buffers, or not yet averaged.
    """
    if plan.zero_stage != 0 or plan.precision != "fp32":
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def norm_of_step(engine: Any, plan: Plan) -> float | None:
    """The norm, before clipping, that DeepSpeed computed in the last step; the same on every rank.

    None if the JSON switches it off. Raises RunFailed if DeepSpeed has none although it is on: the spike guard needs
    it, and a NaN in the gradients would go unnoticed.
    """
    norm = engine.get_global_grad_norm()
    if norm is not None:
        return float(norm)
    if not engine.zero_compute_grad_norm():
        return None
    raise RunFailed(
        f"DeepSpeed reports no gradient norm for its {type(engine.optimizer).__name__}: this launcher reads it as in "
        f"DeepSpeed {plan.machine.versions.get('deepspeed', '')}; another version may keep it elsewhere"
    )
