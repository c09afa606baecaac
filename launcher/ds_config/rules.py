"""Combinations of keys in a DeepSpeed JSON that fail in deepspeed.initialize, or run but hurt.

Each rule is a generator of findings for one `RuleContext`. Their claims about DeepSpeed were tested with 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from launcher.ds_config.engine_rules import ENGINE_RULES, updates_only_host_memory
from launcher.ds_config.facts import AUTO, BATCH_KEYS, as_bool, as_number, bf16_key
from launcher.ds_config.findings import Finding, finding, rewrite
from launcher.ds_config.loop_rules import LOOP_RULES
from launcher.ds_config.optimizer_rules import OPTIMIZER_RULES
from launcher.ds_config.rule_context import ZERO, Rule, RuleContext
from launcher.ds_config.schedule_rules import SCHEDULE_RULES


def combinations(context: RuleContext) -> Iterator[Finding]:
    """The findings of all rules."""
    for rule in (*RULES, *OPTIMIZER_RULES, *ENGINE_RULES, *LOOP_RULES, *SCHEDULE_RULES):
        yield from rule(context)


def _precision(context: RuleContext) -> Iterator[Finding]:
    bf16 = bf16_key(context.config)
    if context.on(f"{bf16}.enabled") and context.on("fp16.enabled"):
        message = "fp16 and bf16 are both on: DeepSpeed fails"
        yield context.finding("error", "fp16.enabled", message, "Switch fp16 off if the hardware supports bf16.")
    if context.on("torch_autocast.enabled") and (context.on(f"{bf16}.enabled") or context.on("fp16.enabled")):
        message = "autocast and bf16 or fp16 are both on: the weights are not kept in fp32"
        yield context.finding("warning", "torch_autocast.enabled", message, "Keep one of the two.")
    for path in (f"{bf16}.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads"):
        if context.on(path) and context.stage == 0:
            yield context.finding("error", path, "fails without ZeRO", "Set zero_optimization.stage to 1, 2 or 3.")
    scale = context.number("fp16.loss_scale")
    if scale is not None and scale < 0:
        yield context.finding("error", "fp16.loss_scale", f"found {scale!r}", "Write 0 for a dynamic loss scale.")
    states = f"{bf16}.bf16_optimizer_states"
    if context.on(states) and not context.on(f"{bf16}.bf16_master_weights_and_grads"):
        message = "fails without bf16_master_weights_and_grads"
        yield context.finding("error", states, message, "Switch both on, or both off.")


def _batches(context: RuleContext) -> Iterator[Finding]:
    sizes = {key: context.number(key) for key in BATCH_KEYS}
    for key in BATCH_KEYS:
        value = context.config.get(key)
        if value in (None, AUTO):
            continue
        if isinstance(value, str) and sizes[key] is not None:
            fix = rewrite(context.config, key, value)
            message = (
                f"a number in quotes, {value!r}, which DeepSpeed does not convert here; the launcher's plan converts it"
            )
            yield finding(context.config, "error", key, message, f"Write {value} without quotes.", fix)
        elif type(sizes[key]) is not int or sizes[key] < 1:
            yield context.finding("error", key, f"found {value!r}", 'Write a whole number above 0, or "auto".')
            return
    yield from _product(context, *sizes.values())


def _product(context: RuleContext, batch: int | None, micro: int | None, accumulation: int | None) -> Iterator[Finding]:
    if batch is None or not (micro or accumulation or context.target.world_size):
        return
    world = context.target.world_size or 1
    rest = (micro or 1) * (accumulation or 1) * world
    whole = None not in (micro, accumulation, context.target.world_size)
    if (whole and batch != rest) or batch % rest:
        parts = (("micro-batch", micro), ("accumulation", accumulation), ("world size", context.target.world_size))
        named = " x ".join(f"{word} {size}" for word, size in parts if size)
        message = f"{batch} is not {named}" if whole else f"{batch} is not a multiple of {named}"
        hint = 'Write "auto" for one of the three.' if micro and accumulation else "Change one of them."
        yield context.finding("error", "train_batch_size", message, hint)


def _stage_keys(context: RuleContext) -> Iterator[Finding]:
    block = context.config.get(ZERO)
    if isinstance(block, bool):
        fix = rewrite(context.config, ZERO, f'{{"stage": {int(block)}}}')
        hint = f'Write {{"stage": {int(block)}}}.'
        yield finding(context.config, "warning", ZERO, "true or false is an old form of this block", hint, fix)
    if not isinstance(block, dict) or context.stage is None:
        return
    if "stage" not in block and block:
        message = "no stage is set, which means stage 0: this block has no effect"
        yield context.finding("warning", ZERO, message, "Add a stage: 1, 2 or 3.")
        return
    names = context.keys.blocks[ZERO].keys
    for key, value in block.items():
        if context.stage < 3 and _needs_stage3((names[key].alias if key in names else None) or key, value):
            message = f"has no effect under stage {context.stage}: the key is for ZeRO-3"
            yield context.finding("warning", f"{ZERO}.{key}", message, "Set stage to 3, or remove it.")


def _needs_stage3(key: str, value: Any) -> bool:
    if key == "offload_param":
        return isinstance(value, dict) and value.get("device") in ("cpu", "nvme")
    if key == "zero_hpz_partition_size":
        return as_number(value) not in (0, 1)
    if key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        return as_bool(value) is True
    return key.startswith("stage3_")


def _offloading(context: RuleContext) -> Iterator[Finding]:
    for name, device in (
        ("offload_optimizer", context.offload.optimizer),
        ("offload_param", context.offload.parameters),
    ):
        path = f"{ZERO}.{name}"
        if device == "nvme" and context.config.get(f"{path}.nvme_path") is None:
            message = "NVMe offload without nvme_path fails"
            yield context.finding("error", path, message, 'Add "nvme_path": "/folder/on/the/nvme".')
        if device == "nvme" and name == "offload_optimizer" and context.stage in (1, 2):
            message = f"stage {context.stage} does not offload to NVMe"
            yield context.finding("error", f"{path}.device", message, "Set stage to 3, or device to cpu.")
    written = f"{ZERO}.stage" in context.config.locations
    if context.offloaded and context.stage == 0 and written and not updates_only_host_memory(context):
        message = "offload has no effect under stage 0"
        yield context.finding("warning", f"{ZERO}.offload_optimizer", message, "Set stage to 1, 2 or 3.")
    ratio = context.number(f"{ZERO}.offload_optimizer.ratio")
    if ratio is not None and ratio < 1 and context.stage in (0, 1, 2):
        path = f"{ZERO}.offload_optimizer.ratio"
        yield context.finding("error", path, "partial offload fails below stage 3", "Set stage to 3, or ratio to 1.")


def _string_choices(context: RuleContext) -> Iterator[Finding]:
    """Strings with a few allowed values."""
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        value = context.config.get(key)
        if isinstance(value, str) and value.lower() not in ("fp32", "fp16", "bf16", AUTO):
            yield context.finding("error", key, f"{value!r} is not an allowed value", "Use fp32, fp16 or bf16.")
    tags = context.config.get("checkpoint.tag_validation")
    if isinstance(tags, str) and tags.upper() not in ("WARN", "IGNORE", "FAIL"):
        message = f"{tags!r} is not an allowed value"
        yield context.finding("error", "checkpoint.tag_validation", message, "Use Warn, Ignore or Fail.")


def _clipping(context: RuleContext) -> Iterator[Finding]:
    value = context.number("gradient_clipping")
    if value is not None and not 0 <= value < math.inf:
        message = f"{value} is {'below 0' if value < 0 else 'NaN or Inf'}: DeepSpeed accepts it and does not clip"
        yield context.finding("error", "gradient_clipping", message, "Write 1.0, or 0 to switch clipping off.")
    elif value == 0:
        message = "gradients are not clipped: one bad batch can ruin a fine-tuning run"
        yield context.finding("warning", "gradient_clipping", message, "Write 1.0.")


def _gathering(context: RuleContext) -> Iterator[Finding]:
    names = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
    for path in (f"{ZERO}.{name}" for name in names):
        if context.stage == 3 and context.off(path):
            message = "save_16bit_model, which transformers' Trainer uses, then saves no weights"
            hint = "Write true if a script saves the model; the launcher's export does not need it."
            yield context.finding("note", path, message, hint)


def _printing(context: RuleContext) -> Iterator[Finding]:
    steps = context.config.get("steps_per_print")
    if steps == 0 and not isinstance(steps, bool):
        message = "DeepSpeed divides by it and fails"
        yield context.finding("error", "steps_per_print", message, "Write null to switch printing off.")
    elif isinstance(steps, (int, float)) and steps < 0 and not math.isinf(steps):
        message = f"{steps} does not switch printing off: DeepSpeed prints at every update that it divides"
        yield context.finding("warning", "steps_per_print", message, "Write null.")


RULES: tuple[Rule, ...] = (
    _precision,
    _batches,
    _stage_keys,
    _offloading,
    _string_choices,
    _clipping,
    _gathering,
    _printing,
)
