"""The fine-tuned model as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

from launcher.plan.model import Plan
from launcher.worker.model import load_tokenizer
from launcher.worker.ranks import Ranks


def export_model(engine: Any, plan: Plan, ranks: Ranks, folder: Path) -> None:
    """Writes config, tokenizer and safetensors to `folder`, which appears whole; all ranks must call it."""
    weights = _gathered(engine.module, ranks) if plan.zero_stage == 3 else engine.module.state_dict()
    if ranks.first:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        engine.module.save_pretrained(temporary, state_dict=weights)
        load_tokenizer(plan).save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    ranks.barrier()


def _gathered(module: Any, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Whole weights in the first rank's host memory, one parameter at a time; tied ones once, as they are stored."""
    weights = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks.first:
                weights[name] = parameter.detach().cpu().clone()
    kept = set(module.state_dict()) if ranks.first else set()
    buffers = {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in kept}
    return {**weights, **buffers}
