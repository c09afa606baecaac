"""The optimizer block: what its class does not take, and what ZeRO or the device does not do with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from launcher.ds_config import aliases
from launcher.ds_config.case import ZERO, Case, Rule
from launcher.ds_config.catalogue import Block
from launcher.ds_config.facts import AUTO, BATCH_KEYS, is_open
from launcher.ds_config.findings import Finding, finding, rename, sure_match
from launcher.ds_config.optimizer_class import ADAM_TYPES, CPU_ADAM, TORCH_ADAM, fills_torch_adam
from launcher.errors import nearest

_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""What DeepSpeed takes out of Adam's parameters before the class sees them."""
_MUP = ("muadam", "muadamw", "musgd")
_ONE_GROUP = ("LBFGS",)
_SPARSE = ("SparseAdam",)


def parameters_of(case: Case, written: str) -> Block | None:
    """What the class that is really built takes; None where it is not known."""
    kind = case.keys.optimizers.get(case.keys.optimizer_name(written) or "")
    name = case.built.name if case.built else ""
    block = case.keys.classes.get(CPU_ADAM if name == "ZenFlowCPUAdam" else name)
    if block is None or kind is None:
        return kind
    switches = {one: kind.keys[one] for one in _SWITCHES if one in kind.keys}
    return Block({**block.keys, **switches})


def unknown_parameter(case: Case, written: str, key: str, block: Block) -> Finding:
    """An optimizer parameter that the class does not take."""
    path = f"optimizer.params.{key}"
    if key == "max_grad_norm":
        message = "DeepSpeed refuses it as an optimizer parameter"
        return case.found("error", path, message, "Use gradient_clipping at the top of the JSON.")
    takers = [
        name
        for name in ("torch.optim.AdamW", "FusedAdam", CPU_ADAM)
        if written.lower() in ADAM_TYPES and key in case.keys.classes.get(name, Block({})).keys
    ]
    if takers and case.built is not None:
        message = f"{case.built} has no such parameter, and DeepSpeed fails on it"
        other = ', or write "torch_adam": false' if fills_torch_adam(case.config, case.target.device) else ""
        return case.found("error", path, message, f"Take it out{other}: only {' and '.join(takers)} {_has(takers)} it.")
    close, sure = nearest(key, block.names), sure_match(key, block.names)
    guess = f"Did you mean {close}?" if close else f"It takes {', '.join(sorted(block.names))}."
    what = case.built.name if case.built and case.built.name != written else written
    message = f"{what} has no such parameter and fails on it"
    fix = rename(case.config, path, sure) if sure else None
    return finding(case.config, "error", path, message, guess, fix)


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _optimizer(case: Case) -> Iterator[Finding]:
    written = case.config.get("optimizer.type")
    if not isinstance(written, str) or written == AUTO:
        return
    name = case.keys.optimizer_name(written)
    if name is None:
        same = (known for known in case.keys.optimizers if known.lower() == written.lower())
        close = next(same, None) or nearest(written, case.keys.optimizers)
        guess = f"Did you mean {close}?" if close else "Take AdamW, or another of torch.optim."
        hint = aliases.OPTIMIZERS.get(written.lower(), guess)
        yield case.found("error", "optimizer.type", f"{written} is not an optimizer of DeepSpeed or PyTorch", hint)
        return
    refused = list(_cannot_run(case, written, name))
    yield from refused or _optimizer_under_zero(case, written, name)
    if case.config.get("optimizer.params.lr") is None and case.config.get("optimizer.params") != AUTO:
        message = "no lr: the optimizer's own default is taken, 1e-3 for Adam, far too high for fine-tuning"
        hint = 'Add "lr" to its params, or "lr": "auto".'
        yield finding(case.config, "warning", "optimizer", message, hint, filled=True)


def _cannot_run(case: Case, written: str, name: str) -> Iterator[Finding]:
    """An optimizer that no other key can make run: on this device, or with a model's parameter groups."""
    path, hint = "optimizer.type", "Take AdamW."
    if name in _MUP and "mup" in case.target.missing:
        yield case.found("error", path, f"{written} is a class of mup, which is not installed", hint)
    elif name in _ONE_GROUP:
        yield case.found("error", path, f"{written} takes one parameter group, and a model has two", hint)
    elif name in _SPARSE:
        yield case.found("error", path, f"{written} takes sparse gradients only, and a model's are dense", hint)
    elif name == "adagrad" and case.stage:
        message = f"{written} fails under ZeRO, which hands it empty parts of parameters"
        yield case.found("error", path, message, f"Set {ZERO}.stage to 0, or take AdamW.")
    elif case.cpu and case.built and case.built.name in ("FusedLamb", "FusedLion"):
        there = " But with offload, Lion has a CPU version." if name == "lion" else ""
        message = f"{written} comes to {case.built.name}, which DeepSpeed has for GPUs only; this is checked for CPUs"
        yield case.found("error", path, message, f"Use AdamW on CPUs.{there}")
    elif name == "lamb" and case.offloaded and case.stage:
        message = f"{written} has no CPU version, and offloaded states are updated on the CPU"
        yield case.found("error", path, message, "Take AdamW, or do not offload the optimizer.")


def _optimizer_under_zero(case: Case, written: str, name: str) -> Iterator[Finding]:
    if case.stage and name not in case.keys.zero_optimizers and not case.on("zero_allow_untested_optimizer"):
        message = f"ZeRO refuses {written} as untested"
        hint = 'Add "zero_allow_untested_optimizer": true, or take AdamW.'
        yield case.found("error", "optimizer.type", message, hint)
    if case.stage and case.offloaded and case.on(TORCH_ADAM):
        message = "PyTorch's Adam will update the offloaded states, several times slower than DeepSpeedCPUAdam"
        yield case.found("note", TORCH_ADAM, message, "Take it out on machines with GPUs.")


def _values(case: Case) -> Iterator[Finding]:
    """What torch.optim refuses, and DeepSpeed's own kernels take without a word."""
    betas = case.config.get("optimizer.params.betas")
    if betas is not None and not is_open(betas) and not _is_betas(betas):
        message = f"found {betas!r}"
        yield case.found("error", "optimizer.params.betas", message, "Write two numbers from 0 to below 1.")
    for name in ("lr", "eps", "weight_decay", "muon_lr", "adam_lr"):
        value = case.number(path := f"optimizer.params.{name}")
        if value is not None and not 0 <= value < math.inf:
            yield case.found("error", path, f"found {value!r}", "Write a number from 0 up.")
    if case.on("optimizer.params.maximize"):
        message = "the optimizer increases the loss instead of decreasing it"
        yield case.found("warning", "optimizer.params.maximize", message, "Take it out.")


def _is_betas(value: Any) -> bool:
    numbers = value if isinstance(value, list) else []
    sane = [isinstance(one, (int, float)) and not isinstance(one, bool) and 0 <= one < 1 for one in numbers]
    return sane == [True, True]


def _switches(case: Case) -> Iterator[Finding]:
    """Parameters that the class takes and then fails on."""
    name, path = (case.built.name if case.built else ""), "optimizer.params."
    if name == "FusedAdam" and case.on(f"{path}amsgrad"):
        message = f"{case.built} does not support it and fails"
        yield case.found("error", f"{path}amsgrad", message, 'Take it out, or add "torch_adam": true.')
    if case.on(f"{path}differentiable"):
        message = "fails: the update writes into parameters that need gradients"
        yield case.found("error", f"{path}differentiable", message, "Take it out.")
    if case.on(f"{path}capturable") and (case.cpu or case.offloaded):
        message = "fails on states in host memory: it is for CUDA graphs"
        yield case.found("error", f"{path}capturable", message, "Take it out.")


def _client_optimizer(case: Case) -> Iterator[Finding]:
    """Only where nothing is left to fill: such a JSON is meant for a script that makes its own optimizer."""
    left_open = any(case.config.get(key) == AUTO for key in (*BATCH_KEYS, "gradient_clipping"))
    forced = not case.off("zero_force_ds_cpu_optimizer")
    if left_open or case.config.get("optimizer") is not None or not case.offloaded or not forced:
        return
    message = "offload without an optimizer block: a script's own optimizer must be DeepSpeedCPUAdam, else it fails"
    yield case.found("note", f"{ZERO}.offload_optimizer", message, "Add an optimizer block.")


def needs_cpu_adam(case: Case, path: str, what: str) -> Iterator[Finding]:
    """`what`, at `path`, works with offload and DeepSpeedCPUAdam alone."""
    if case.offloaded and case.built and case.built.name == CPU_ADAM:
        return
    if not case.offloaded:
        message, hint = "no optimizer states are offloaded", f"Add {ZERO}.offload_optimizer with device cpu, or take"
    elif fills_torch_adam(case.config, case.target.device):
        message = f"{case.built and case.built.name} is built: on CPUs the launcher sets torch_adam"
        hint = 'Add "torch_adam": false to optimizer.params, or take'
    else:
        message, hint = f"{case.built or 'another optimizer'} is built", "Take AdamW without torch_adam, or take"
    yield case.found("error", path, f"{what} needs DeepSpeedCPUAdam, and {message}", f"{hint} it out.")


def _zenflow(case: Case) -> Iterator[Finding]:
    if case.config.get(f"{ZERO}.zenflow") in (None, AUTO) or not case.stage:
        return
    if not case.offloaded:
        message, hint = "fails without offload", f"Add {ZERO}.offload_optimizer with device cpu, or take it out."
        yield case.found("error", f"{ZERO}.zenflow", message, hint)
    elif case.built is None or case.built.name != "ZenFlowCPUAdam":
        message = f"needs ZenFlowCPUAdam, and {case.built or 'another optimizer'} is built"
        hint = 'Take AdamW with "torch_adam": false, or take ZenFlow out.'
        yield case.found("error", f"{ZERO}.zenflow", message, hint)


OPTIMIZER_RULES: tuple[Rule, ...] = (_optimizer, _values, _switches, _client_optimizer, _zenflow)
