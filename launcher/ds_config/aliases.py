"""Names and values from other tools and from DeepSpeed's own classes, and how a DeepSpeed JSON says what they mean."""

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
"""Keys at the top, and the path that DeepSpeed reads in their place."""

_ADAM = 'Write "AdamW": DeepSpeed takes its fused kernel, or its CPU version under offload, by itself.'
_LAMB = 'Write "Lamb": DeepSpeed takes its fused kernel by itself.'
_LION = 'Write "Lion": DeepSpeed takes its fused kernel, or its CPU version under offload, by itself.'
_EIGHT_BIT = 'Write "AdamW": DeepSpeed has no optimizer of 8-bit states; ZeRO divides them, and offload moves them.'
OPTIMIZERS = {
    **dict.fromkeys(
        ("fusedadam", "cpuadam", "deepspeedcpuadam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), _ADAM
    ),
    **dict.fromkeys(("adam8bit", "adamw8bit", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _EIGHT_BIT),
    "fusedlamb": _LAMB,
    **dict.fromkeys(("fusedlion", "cpulion", "deepspeedcpulion", "lion_pytorch"), _LION),
}
"""Optimizer types in lower case, and what to do about them."""

_LENGTH = "Write total_num_steps: the updates of the whole run, warm-up included."
_WARMUP = "Write warmup_num_steps: the updates of the warm-up."
_SHARE = "Write warmup_num_steps, in updates: this share of total_num_steps."
_PEAK = {
    "WarmupLR": "Write warmup_max_lr.",
    "WarmupDecayLR": "Write warmup_max_lr.",
    "WarmupCosineLR": "Take it out: WarmupCosineLR climbs to optimizer.params.lr.",
}
_START = {
    "WarmupLR": "Write warmup_min_lr.",
    "WarmupDecayLR": "Write warmup_min_lr.",
    "WarmupCosineLR": "Write warmup_min_ratio: where the warm-up starts, as a share of optimizer.params.lr.",
}
_FLOOR = {
    "WarmupLR": "Take it out: WarmupLR stays at its peak.",
    "WarmupDecayLR": "Take it out: WarmupDecayLR falls to 0.",
    "WarmupCosineLR": "Write cos_min_ratio: where the cosine ends, as a share of optimizer.params.lr.",
}
_BY_NAME: dict[str, str | dict[str, str]] = {
    **dict.fromkeys(("warmup_ratio", "warmup_proportion", "warmup_pct"), _SHARE),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "warmup_iters"), _WARMUP),
    **dict.fromkeys(("max_steps", "total_steps", "num_training_steps", "total_iters", "T_max"), _LENGTH),
    **dict.fromkeys(("lr", "max_lr", "peak_lr", "warmup_max_lr", "warmup_max_ratio"), _PEAK),
    **dict.fromkeys(("warmup_min_lr", "warmup_start_lr", "start_lr"), _START),
    **dict.fromkeys(("min_lr", "eta_min", "cos_min_lr", "min_lr_ratio", "lr_min"), _FLOOR),
}


def scheduler_param(kind: str, name: str) -> str | None:
    """What to write for the parameter `name` that the scheduler `kind` does not have; None where nobody knows."""
    found = _BY_NAME.get(name) if kind in _PEAK else None
    return found.get(kind) if isinstance(found, dict) else found


def value(path: str, written: Any) -> str | None:
    """What to write for a value that DeepSpeed does not have at `path`; None where nobody knows."""
    if path == "scheduler.type" and written is None:
        return 'Name one, such as "WarmupDecayLR", or take the block out: DeepSpeed ignores it without a type.'
    if path.endswith((".offload_optimizer.device", ".offload_param.device")) and written in ("gpu", "cuda", "GPU"):
        return 'Write "none", which leaves it on the GPU, or take the block out.'
    return None
