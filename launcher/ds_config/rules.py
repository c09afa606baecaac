"""How the keys of a DeepSpeed JSON go together: what fails in deepspeed.initialize, and what runs but hurts.

Each rule is a generator of findings over one `Case`. What they claim of DeepSpeed was run with 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from launcher.ds_config.case import ZERO, Case, Rule
from launcher.ds_config.engine_rules import ENGINE_RULES, updates_on_cpu
from launcher.ds_config.facts import AUTO, BATCH_KEYS, as_bool, as_number, bf16_key
from launcher.ds_config.findings import Finding, finding, rewrite
from launcher.ds_config.loop_rules import LOOP_RULES
from launcher.ds_config.optimizer_rules import OPTIMIZER_RULES
from launcher.ds_config.schedule_rules import SCHEDULE_RULES


def combinations(case: Case) -> Iterator[Finding]:
    """Everything the rules find in a JSON."""
    for rule in (*RULES, *OPTIMIZER_RULES, *ENGINE_RULES, *LOOP_RULES, *SCHEDULE_RULES):
        yield from rule(case)


def _precision(case: Case) -> Iterator[Finding]:
    bf16 = bf16_key(case.config)
    if case.on(f"{bf16}.enabled") and case.on("fp16.enabled"):
        message = "fp16 and bf16 are both on, and DeepSpeed fails on that"
        yield case.found("error", "fp16.enabled", message, "Switch fp16 off where the hardware has bf16.")
    if case.on("torch_autocast.enabled") and (case.on(f"{bf16}.enabled") or case.on("fp16.enabled")):
        message = "autocast is on beside bf16 or fp16: the weights are no longer held in fp32 for it"
        yield case.found("warning", "torch_autocast.enabled", message, "Keep one of the two.")
    for path in (f"{bf16}.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads"):
        if case.on(path) and case.stage == 0:
            yield case.found("error", path, "fails without ZeRO", "Set zero_optimization.stage to 1, 2 or 3.")
    scale = case.number("fp16.loss_scale")
    if scale is not None and scale < 0:
        yield case.found("error", "fp16.loss_scale", f"found {scale!r}", "Write 0, which lets DeepSpeed adapt it.")
    states = f"{bf16}.bf16_optimizer_states"
    if case.on(states) and not case.on(f"{bf16}.bf16_master_weights_and_grads"):
        message = "fails without bf16_master_weights_and_grads"
        yield case.found("error", states, message, "Switch that on too, or this off.")


def _batches(case: Case) -> Iterator[Finding]:
    sizes = {key: case.number(key) for key in BATCH_KEYS}
    for key in BATCH_KEYS:
        value = case.config.get(key)
        if value in (None, AUTO):
            continue
        if isinstance(value, str) and sizes[key] is not None:
            fix = rewrite(case.config, key, value)
            message = (
                f"a number in quotes, {value!r}, which DeepSpeed does not convert here; a plan of the launcher does"
            )
            yield finding(case.config, "error", key, message, f"Write {value} without quotes.", fix)
        elif type(sizes[key]) is not int or sizes[key] < 1:
            yield case.found("error", key, f"found {value!r}", 'Write a whole number above 0, or "auto".')
            return
    yield from _product(case, *sizes.values())


def _product(case: Case, batch: int | None, micro: int | None, accumulation: int | None) -> Iterator[Finding]:
    if batch is None or not (micro or accumulation or case.target.world_size):
        return
    world = case.target.world_size or 1
    rest = (micro or 1) * (accumulation or 1) * world
    whole = None not in (micro, accumulation, case.target.world_size)
    if (whole and batch != rest) or batch % rest:
        parts = (("micro-batch", micro), ("accumulation", accumulation), ("world size", case.target.world_size))
        named = " x ".join(f"{word} {size}" for word, size in parts if size)
        message = f"{batch} is not {named}" if whole else f"{batch} is no multiple of {named}"
        hint = 'Leave one of the three to "auto".' if micro and accumulation else "Change one of them."
        yield case.found("error", "train_batch_size", message, hint)


def _stage_keys(case: Case) -> Iterator[Finding]:
    block = case.config.get(ZERO)
    if isinstance(block, bool):
        fix = rewrite(case.config, ZERO, f'{{"stage": {int(block)}}}')
        hint = f'Write {{"stage": {int(block)}}}.'
        yield finding(case.config, "warning", ZERO, "true or false here is an old form", hint, fix)
    if not isinstance(block, dict) or case.stage is None:
        return
    if "stage" not in block and block:
        message = "no stage is set, which means stage 0: nothing in this block has an effect"
        yield case.found("warning", ZERO, message, "Add a stage: 1, 2 or 3.")
        return
    names = case.keys.blocks[ZERO].keys
    for key, value in block.items():
        if case.stage < 3 and _needs_stage3((names[key].alias if key in names else None) or key, value):
            message = f"has no effect under stage {case.stage}: it is a key of ZeRO-3"
            yield case.found("warning", f"{ZERO}.{key}", message, "Set stage to 3, or take it out.")


def _needs_stage3(key: str, value: Any) -> bool:
    if key == "offload_param":
        return isinstance(value, dict) and value.get("device") in ("cpu", "nvme")
    if key == "zero_hpz_partition_size":
        return as_number(value) not in (0, 1)
    if key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        return as_bool(value) is True
    return key.startswith("stage3_")


def _offloading(case: Case) -> Iterator[Finding]:
    for name, device in (
        ("offload_optimizer", case.offload.optimizer),
        ("offload_param", case.offload.parameters),
    ):
        path = f"{ZERO}.{name}"
        if device == "nvme" and case.config.get(f"{path}.nvme_path") is None:
            message = "NVMe offload without nvme_path fails"
            yield case.found("error", path, message, 'Add "nvme_path": "/folder/on/the/nvme".')
        if device == "nvme" and name == "offload_optimizer" and case.stage in (1, 2):
            message = f"stage {case.stage} does not offload to NVMe: the states stay where they are"
            yield case.found("error", f"{path}.device", message, "Set stage to 3, or device to cpu.")
    written = f"{ZERO}.stage" in case.config.places
    if case.offloaded and case.stage == 0 and written and not updates_on_cpu(case):
        message = "offload has no effect under stage 0"
        yield case.found("warning", f"{ZERO}.offload_optimizer", message, "Set stage to 1, 2 or 3.")
    ratio = case.number(f"{ZERO}.offload_optimizer.ratio")
    if ratio is not None and ratio < 1 and case.stage in (0, 1, 2):
        path = f"{ZERO}.offload_optimizer.ratio"
        yield case.found("error", path, "partial offload fails below stage 3", "Set stage to 3, or ratio to 1.")


def _words(case: Case) -> Iterator[Finding]:
    """Values that are one of a few words."""
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        value = case.config.get(key)
        if isinstance(value, str) and value.lower() not in ("fp32", "fp16", "bf16", AUTO):
            yield case.found("error", key, f"{value!r} is none of its values", "Take fp32, fp16 or bf16.")
    tags = case.config.get("checkpoint.tag_validation")
    if isinstance(tags, str) and tags.upper() not in ("WARN", "IGNORE", "FAIL"):
        message = f"{tags!r} is none of its values"
        yield case.found("error", "checkpoint.tag_validation", message, "Take Warn, Ignore or Fail.")


def _clipping(case: Case) -> Iterator[Finding]:
    value = case.number("gradient_clipping")
    if value is not None and not 0 <= value < math.inf:
        message = f"{value} is {'below 0' if value < 0 else 'no number'}: DeepSpeed takes it and does not clip"
        yield case.found("error", "gradient_clipping", message, "Write 1.0, or 0 to leave gradients alone.")
    elif value == 0:
        message = "gradients are not clipped: one bad batch can undo a fine-tuning"
        yield case.found("warning", "gradient_clipping", message, "Write 1.0.")


def _gathering(case: Case) -> Iterator[Finding]:
    names = ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
    for path in (f"{ZERO}.{name}" for name in names):
        if case.stage == 3 and case.off(path):
            message = "save_16bit_model, and with it transformers' Trainer, then saves no weights"
            hint = "Write true where a script saves; the launcher's own export needs neither."
            yield case.found("note", path, message, hint)


def _printing(case: Case) -> Iterator[Finding]:
    steps = case.config.get("steps_per_print")
    if steps == 0 and not isinstance(steps, bool):
        message = "DeepSpeed divides by it and fails"
        yield case.found("error", "steps_per_print", message, "Write null, which switches the printing off.")
    elif isinstance(steps, (int, float)) and steps < 0 and not math.isinf(steps):
        message = f"{steps} does not switch the printing off: DeepSpeed prints whenever it divides the update's number"
        yield case.found("warning", "steps_per_print", message, "Write null.")


RULES: tuple[Rule, ...] = (
    _precision,
    _batches,
    _stage_keys,
    _offloading,
    _words,
    _clipping,
    _gathering,
    _printing,
)
