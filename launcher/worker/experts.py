"""Mixtures of experts under ZeRO-3."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import set_z3_leaf_modules
from torch import nn


def gather_experts_together(model: Any) -> tuple[type, ...]:
    """Makes every block that chooses among its experts one unit of ZeRO-3; returns the classes of the blocks.

    Ranks gather weights in step, module by module, but tokens of one rank may need experts that those of another do
    not. Of a unit all weights are gathered on every rank, whichever experts are used. transformers' own classes hold
    all experts in one parameter and need no such unit; code that comes with a model often has a list of modules.
    """
    blocks = {type(module): None for module in model.modules() if _chooses_experts(module)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))
    return tuple(blocks)


def _chooses_experts(module: nn.Module) -> bool:
    return any(
        isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1 and "expert" in name.lower()
        for name, child in module.named_children()
    )
