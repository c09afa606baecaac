"""The optimizer block: what its class, ZeRO or the device does not support."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from launcher.ds_config import aliases
from launcher.ds_config.catalogue import Block
from launcher.ds_config.facts import AUTO, BATCH_KEYS, has_auto
from launcher.ds_config.findings import Finding, finding, rename, unambiguous_match
from launcher.ds_config.optimizer_class import ADAM_TYPES, CPU_ADAM, TORCH_ADAM, fills_torch_adam
from launcher.ds_config.rule_context import ZERO, Rule, RuleContext
from launcher.errors import nearest

_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""Parameters of Adam that DeepSpeed removes before it calls the class."""
_MUP = ("muadam", "muadamw", "musgd")
_ONE_GROUP = ("LBFGS",)
_SPARSE = ("SparseAdam",)


def parameters_of(context: RuleContext, written: str) -> Block | None:
    """The parameters of the class that DeepSpeed builds; None if unknown."""
    kind = context.keys.optimizers.get(context.keys.optimizer_name(written) or "")
    name = context.optimizer_class.name if context.optimizer_class else ""
    block = context.keys.classes.get(CPU_ADAM if name == "ZenFlowCPUAdam" else name)
    if block is None or kind is None:
        return kind
    switches = {one: kind.keys[one] for one in _SWITCHES if one in kind.keys}
    return Block({**block.keys, **switches})


def unknown_parameter(context: RuleContext, written: str, key: str, block: Block) -> Finding:
    """An optimizer parameter that the class does not accept."""
    path = f"optimizer.params.{key}"
    if key == "max_grad_norm":
        message = "DeepSpeed rejects it as an optimizer parameter"
        return context.finding("error", path, message, "Use gradient_clipping at the top of the JSON.")
    accepting = [
        name
        for name in ("torch.optim.AdamW", "FusedAdam", CPU_ADAM)
        if written.lower() in ADAM_TYPES and key in context.keys.classes.get(name, Block({})).keys
    ]
    if accepting and context.optimizer_class is not None:
        message = f"{context.optimizer_class} has no such parameter, and DeepSpeed fails on it"
        other = ', or write "torch_adam": false' if fills_torch_adam(context.config, context.target.device) else ""
        return context.finding(
            "error", path, message, f"Remove it{other}: only {' and '.join(accepting)} {_accept(accepting)} it."
        )
    close, sure = nearest(key, block.names), unambiguous_match(key, block.names)
    guess = f"Did you mean {close}?" if close else f"It accepts {', '.join(sorted(block.names))}."
    class_name = (
        context.optimizer_class.name if context.optimizer_class and context.optimizer_class.name != written else written
    )
    message = f"{class_name} has no such parameter and fails on it"
    fix = rename(context.config, path, sure) if sure else None
    return finding(context.config, "error", path, message, guess, fix)


def _accept(names: list[str]) -> str:
    return "accepts" if len(names) == 1 else "accept"


def _optimizer(context: RuleContext) -> Iterator[Finding]:
    written = context.config.get("optimizer.type")
    if not isinstance(written, str) or written == AUTO:
        return
    name = context.keys.optimizer_name(written)
    if name is None:
        same = (known for known in context.keys.optimizers if known.lower() == written.lower())
        close = next(same, None) or nearest(written, context.keys.optimizers)
        guess = f"Did you mean {close}?" if close else "Use AdamW or another torch.optim optimizer."
        hint = aliases.OPTIMIZERS.get(written.lower(), guess)
        yield context.finding(
            "error", "optimizer.type", f"neither DeepSpeed nor PyTorch has an optimizer {written}", hint
        )
        return
    errors = list(_cannot_run(context, written, name))
    yield from errors or _optimizer_under_zero(context, written, name)
    if context.config.get("optimizer.params.lr") is None and context.config.get("optimizer.params") != AUTO:
        message = "no lr: the optimizer's default applies, 1e-3 for Adam, far too high for fine-tuning"
        hint = 'Add "lr" to its params, or "lr": "auto".'
        yield finding(context.config, "warning", "optimizer", message, hint, filled=True)


def _cannot_run(context: RuleContext, written: str, name: str) -> Iterator[Finding]:
    """An optimizer that cannot run on this device or with a model's parameter groups, whatever the other keys."""
    path, hint = "optimizer.type", "Use AdamW."
    if name in _MUP and "mup" in context.target.missing:
        yield context.finding("error", path, f"{written} is in the package mup, which is not installed", hint)
    elif name in _ONE_GROUP:
        yield context.finding("error", path, f"{written} supports one parameter group, and a model has two", hint)
    elif name in _SPARSE:
        yield context.finding(
            "error", path, f"{written} supports only sparse gradients, and a model has dense ones", hint
        )
    elif name == "adagrad" and context.stage:
        message = f"{written} fails under ZeRO, which passes it empty parameter partitions"
        yield context.finding("error", path, message, f"Set {ZERO}.stage to 0, or use AdamW.")
    elif context.cpu and context.optimizer_class and context.optimizer_class.name in ("FusedLamb", "FusedLion"):
        exception = " With offload, Lion has a CPU version." if name == "lion" else ""
        message = f"DeepSpeed builds {context.optimizer_class.name}, which needs GPUs; the JSON is checked for CPUs"
        yield context.finding("error", path, message, f"Use AdamW on CPUs.{exception}")
    elif name == "lamb" and context.offloaded and context.stage:
        message = f"{written} has no CPU version, and DeepSpeed updates offloaded states on the CPU"
        yield context.finding("error", path, message, "Use AdamW, or do not offload the optimizer.")


def _optimizer_under_zero(context: RuleContext, written: str, name: str) -> Iterator[Finding]:
    if context.stage and name not in context.keys.zero_optimizers and not context.on("zero_allow_untested_optimizer"):
        message = f"ZeRO rejects {written} as untested"
        hint = 'Add "zero_allow_untested_optimizer": true, or use AdamW.'
        yield context.finding("error", "optimizer.type", message, hint)
    if context.stage and context.offloaded and context.on(TORCH_ADAM):
        message = "PyTorch's Adam updates the offloaded states, several times slower than DeepSpeedCPUAdam"
        yield context.finding("note", TORCH_ADAM, message, "Remove it on machines with GPUs.")


def _values(context: RuleContext) -> Iterator[Finding]:
    """What torch.optim rejects, and DeepSpeed's kernels silently accept."""
    betas = context.config.get("optimizer.params.betas")
    if betas is not None and not has_auto(betas) and not _is_betas(betas):
        message = f"found {betas!r}"
        yield context.finding(
            "error", "optimizer.params.betas", message, "Write two numbers of at least 0 and below 1."
        )
    for name in ("lr", "eps", "weight_decay", "muon_lr", "adam_lr"):
        value = context.number(path := f"optimizer.params.{name}")
        if value is not None and not 0 <= value < math.inf:
            yield context.finding("error", path, f"found {value!r}", "Write a number of at least 0.")
    if context.on("optimizer.params.maximize"):
        message = "the optimizer increases the loss instead of decreasing it"
        yield context.finding("warning", "optimizer.params.maximize", message, "Remove it.")


def _is_betas(value: Any) -> bool:
    numbers = value if isinstance(value, list) else []
    valid = [isinstance(one, (int, float)) and not isinstance(one, bool) and 0 <= one < 1 for one in numbers]
    return valid == [True, True]


def _switches(context: RuleContext) -> Iterator[Finding]:
    """Parameters that the class accepts and then fails on."""
    name, path = (context.optimizer_class.name if context.optimizer_class else ""), "optimizer.params."
    if name == "FusedAdam" and context.on(f"{path}amsgrad"):
        message = f"{context.optimizer_class} does not support it and fails"
        yield context.finding("error", f"{path}amsgrad", message, 'Remove it, or add "torch_adam": true.')
    if context.on(f"{path}differentiable"):
        message = "fails: the update writes to parameters that require gradients"
        yield context.finding("error", f"{path}differentiable", message, "Remove it.")
    if context.on(f"{path}capturable") and (context.cpu or context.offloaded):
        message = "fails on states in host memory: it needs CUDA graphs"
        yield context.finding("error", f"{path}capturable", message, "Remove it.")


def _client_optimizer(context: RuleContext) -> Iterator[Finding]:
    """Only without "auto" values: such a JSON is for a script with its own optimizer."""
    has_autos = any(context.config.get(key) == AUTO for key in (*BATCH_KEYS, "gradient_clipping"))
    forced = not context.off("zero_force_ds_cpu_optimizer")
    if has_autos or context.config.get("optimizer") is not None or not context.offloaded or not forced:
        return
    message = "offload without an optimizer block: a script's optimizer must be DeepSpeedCPUAdam, or it fails"
    yield context.finding("note", f"{ZERO}.offload_optimizer", message, "Add an optimizer block.")


def needs_cpu_adam(context: RuleContext, path: str, feature: str) -> Iterator[Finding]:
    """An error at `path` unless optimizer states are offloaded to DeepSpeedCPUAdam, which `feature` needs."""
    if context.offloaded and context.optimizer_class and context.optimizer_class.name == CPU_ADAM:
        return
    if not context.offloaded:
        message, hint = "no optimizer states are offloaded", f"Add {ZERO}.offload_optimizer with device cpu, or remove"
    elif fills_torch_adam(context.config, context.target.device):
        built = context.optimizer_class and context.optimizer_class.name
        message = f"DeepSpeed builds {built}: on CPUs the launcher sets torch_adam"
        hint = 'Add "torch_adam": false to optimizer.params, or remove'
    else:
        message = f"the optimizer is {context.optimizer_class or 'another one'}"
        hint = "Use AdamW without torch_adam, or remove"
    yield context.finding("error", path, f"{feature} needs DeepSpeedCPUAdam, but {message}", f"{hint} it.")


def _zenflow(context: RuleContext) -> Iterator[Finding]:
    if context.config.get(f"{ZERO}.zenflow") in (None, AUTO) or not context.stage:
        return
    if not context.offloaded:
        message, hint = "fails without offload", f"Add {ZERO}.offload_optimizer with device cpu, or remove it."
        yield context.finding("error", f"{ZERO}.zenflow", message, hint)
    elif context.optimizer_class is None or context.optimizer_class.name != "ZenFlowCPUAdam":
        message = f"needs ZenFlowCPUAdam, but the optimizer is {context.optimizer_class or 'another one'}"
        hint = 'Use AdamW with "torch_adam": false, or remove ZenFlow.'
        yield context.finding("error", f"{ZERO}.zenflow", message, hint)


OPTIMIZER_RULES: tuple[Rule, ...] = (_optimizer, _values, _switches, _client_optimizer, _zenflow)
