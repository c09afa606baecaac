"""Exports what was trained as a Hugging Face folder: the whole model, or its LoRA adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from launcher.export_folder import export_temporary
from launcher.files import replace_folder, share_files
from launcher.plan.schema import Plan
from launcher.worker.model import DTYPES, load_tokenizer
from launcher.worker.ranks import Ranks


def export_model(engine: Any, plan: Plan, ranks: Ranks, folder: Path) -> None:
    """Writes the export to `folder`, which appears only when it is complete. All ranks must call it.

    `write_export` describes its contents.
    """
    module = engine.module
    if plan.zero_stage == 3:
        weights = _gathered(module, ranks, only_trained=plan.training.job.model.lora is not None)
    else:
        weights = trained_weights(module, plan)
    if ranks.first:
        temporary = export_temporary(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        write_export(module, weights, plan, temporary)
        replace_folder(temporary, folder)
    # No barrier: writing a large model can take longer than the timeout of a collective.


def write_export(module: Any, weights: dict[str, torch.Tensor], plan: Plan, folder: Path) -> None:
    """Writes config, tokenizer and safetensors to `folder`.

    With model.lora only the adapters are written. With model.lora.merge the merged model is written, and the adapters
    go to `folder`/adapter.
    """
    if plan.training.job.model.lora is None:
        module.save_pretrained(folder, state_dict=weights)
    else:
        _save_adapters(module, weights, plan, folder)
    tokenizer = load_tokenizer(plan)
    tokenizer.chat_template = plan.training.data.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    share_files(folder, plan.job.output_mode)


def trained_weights(module: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """The weights of an unsharded model that are exported: all of them, or only the adapters."""
    if plan.training.job.model.lora is not None:
        return {name: p.detach().cpu() for name, p in module.named_parameters() if p.requires_grad}
    weights: dict[str, torch.Tensor] = module.state_dict()
    return weights


def _gathered(module: Any, ranks: Ranks, *, only_trained: bool) -> dict[str, torch.Tensor]:
    """Gathers whole weights into the first rank's host memory, one parameter at a time; tied weights once."""
    weights = {}
    for name, parameter in module.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks.first:
                weights[name] = parameter.detach().cpu().clone()
    if only_trained:
        return weights
    kept = set(module.state_dict()) if ranks.first else set()
    buffers = {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in kept}
    return {**weights, **buffers}


def _save_adapters(model: Any, weights: dict[str, torch.Tensor], plan: Plan, folder: Path) -> None:
    lora = plan.training.job.model.lora
    assert lora is not None
    adapters = folder / "adapter" if lora.merge else folder
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = _base_name(plan)
    if isinstance(config.target_modules, set):
        # The order of a set differs between processes, and equal exports must be equal files.
        config.target_modules = sorted(config.target_modules)
    # Embeddings are frozen here. By default, peft would ask the hub whether they were resized.
    model.save_pretrained(adapters, state_dict=weights, save_embedding_layers=False)
    if lora.merge:
        _merged(plan, adapters).save_pretrained(folder)


def _base_name(plan: Plan) -> tuple[str, str | None]:
    """The hub name and revision of the pretrained model, or its folder if it was given as one."""
    section, folder = plan.training.job.model, Path(plan.training.model.folder)
    if f"models--{section.name_or_path.replace('/', '--')}" in folder.parts:
        return section.name_or_path, section.revision
    return str(folder), None


def _merged(plan: Plan, adapters: Path) -> Any:
    """The pretrained model, loaded again into host memory, with the adapters of the folder `adapters` merged in."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(
        plan.training.model.folder,
        dtype=DTYPES[plan.precision],
        trust_remote_code=plan.training.job.model.trust_remote_code,
    )
    return PeftModel.from_pretrained(base, adapters, torch_device="cpu").merge_and_unload(safe_merge=True)
