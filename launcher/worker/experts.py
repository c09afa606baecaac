"""Mixtures of experts under ZeRO-3."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import set_z3_leaf_modules
from torch import nn


def gather_experts_together(model: Any) -> tuple[type, ...]:
    """Makes every block that routes tokens to experts a ZeRO-3 leaf module; returns the classes of the blocks.

    Ranks gather weights module by module and in the same order, but different ranks may use different experts. All
    weights of a leaf module are gathered on every rank, whichever experts are used. The classes of transformers hold
    all experts in one parameter and need no leaf module; the code of remote models often has a list of modules.
    """
    blocks = {type(module): None for module in model.modules() if _routes_to_experts(module)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))
    return tuple(blocks)


def _routes_to_experts(module: nn.Module) -> bool:
    return any(
        isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1 and "expert" in name.lower()
        for name, child in module.named_children()
    )
