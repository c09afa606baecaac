"""Keys, optimizers and values of other tools, and what to write for them in a DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

KEYS = {
    "lr": "optimizer.params.lr",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "max_grad_norm": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "clip_grad_norm": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "gradient_clip_val": "gradient_clipping",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "batch_size": "train_batch_size",
    "global_batch_size": "train_batch_size",
    "zero": "zero_optimization",
    "zero_stage": "zero_optimization.stage",
    "float16": "fp16",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "lr_scheduler": "scheduler",
}
"""Top-level keys, and the path that DeepSpeed reads instead."""

_ADAM = 'Write "AdamW": DeepSpeed uses its fused kernel, or its CPU version with offload.'
_LAMB = 'Write "Lamb": DeepSpeed uses its fused kernel.'
_LION = 'Write "Lion": DeepSpeed uses its fused kernel, or its CPU version with offload.'
_EIGHT_BIT = 'Write "AdamW": DeepSpeed has no 8-bit optimizer; use ZeRO or offload to save memory.'
OPTIMIZERS = {
    **dict.fromkeys(
        ("fusedadam", "cpuadam", "deepspeedcpuadam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), _ADAM
    ),
    **dict.fromkeys(("adam8bit", "adamw8bit", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _EIGHT_BIT),
    "fusedlamb": _LAMB,
    **dict.fromkeys(("fusedlion", "cpulion", "deepspeedcpulion", "lion_pytorch"), _LION),
}
"""Optimizer types in lower case, and the hint for each."""

_LENGTH = "Write total_num_steps: all updates of the run, warm-up included."
_WARMUP = "Write warmup_num_steps: the number of warm-up updates."
_FRACTION = "Write warmup_num_steps, in updates: this fraction of total_num_steps."
_PEAK = {
    "WarmupLR": "Write warmup_max_lr.",
    "WarmupDecayLR": "Write warmup_max_lr.",
    "WarmupCosineLR": "Remove it: WarmupCosineLR peaks at optimizer.params.lr.",
}
_START = {
    "WarmupLR": "Write warmup_min_lr.",
    "WarmupDecayLR": "Write warmup_min_lr.",
    "WarmupCosineLR": "Write warmup_min_ratio: the start of the warm-up, as a fraction of optimizer.params.lr.",
}
_FLOOR = {
    "WarmupLR": "Remove it: WarmupLR stays at its peak.",
    "WarmupDecayLR": "Remove it: WarmupDecayLR decays to 0.",
    "WarmupCosineLR": "Write cos_min_ratio: the end of the cosine, as a fraction of optimizer.params.lr.",
}
_BY_NAME: dict[str, str | dict[str, str]] = {
    **dict.fromkeys(("warmup_ratio", "warmup_proportion", "warmup_pct"), _FRACTION),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "warmup_iters"), _WARMUP),
    **dict.fromkeys(("max_steps", "total_steps", "num_training_steps", "total_iters", "T_max"), _LENGTH),
    **dict.fromkeys(("lr", "max_lr", "peak_lr", "warmup_max_lr", "warmup_max_ratio"), _PEAK),
    **dict.fromkeys(("warmup_min_lr", "warmup_start_lr", "start_lr"), _START),
    **dict.fromkeys(("min_lr", "eta_min", "cos_min_lr", "min_lr_ratio", "lr_min"), _FLOOR),
}


def scheduler_param(kind: str, name: str) -> str | None:
    """What to write for the parameter `name`, which the scheduler `kind` does not have; None if unknown."""
    found = _BY_NAME.get(name) if kind in _PEAK else None
    return found.get(kind) if isinstance(found, dict) else found


def value(path: str, written: Any) -> str | None:
    """What to write for a value that DeepSpeed does not accept at `path`; None if unknown."""
    if path == "scheduler.type" and written is None:
        return 'Write a type, such as "WarmupDecayLR", or remove the block: DeepSpeed ignores it without a type.'
    if path.endswith((".offload_optimizer.device", ".offload_param.device")) and written in ("gpu", "cuda", "GPU"):
        return 'Write "none", which keeps it on the GPU, or remove the block.'
    return None
