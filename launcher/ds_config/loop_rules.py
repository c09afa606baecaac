"""Problems of a JSON that DeepSpeed accepts: missing packages, and keys that the training loop does not support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.ds_config.catalogue import DEEPSPEED_SCHEDULERS
from launcher.ds_config.facts import AUTO, as_bool, as_number
from launcher.ds_config.findings import Finding
from launcher.ds_config.rule_context import Rule, RuleContext

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet-ml"}
"""The package of each monitor; csv_monitor does not need one."""
_WITH_MUP = ("muadam", "muadamw", "musgd")
MONITORS_AND_OPTIMIZERS = (*PACKAGES.values(), "mup")
"""All packages that a JSON can need."""
_ONE_LR = "the launcher's loop gives every parameter group the plan's one learning rate"
_SCRIPT = "or use your own training script with launcher exec"


def needed_packages(data: Mapping[str, Any]) -> dict[str, str]:
    """The packages that DeepSpeed imports for this JSON, each with the key that needs it."""
    blocks = {name: data.get(name) for name in PACKAGES}
    found = {
        PACKAGES[name]: f"{name}.enabled"
        for name, block in blocks.items()
        if isinstance(block, dict) and as_bool(block.get("enabled"))
    }
    optimizer = data.get("optimizer")
    kind = str(optimizer.get("type")).lower() if isinstance(optimizer, dict) else ""
    return {**found, **({"mup": "optimizer.type"} if kind in _WITH_MUP else {})}


def _packages(context: RuleContext) -> Iterator[Finding]:
    for package, key in needed_packages(context.config.data).items():
        if package in context.target.missing and key != "optimizer.type":
            message = f"{package} is not installed: the ranks would fail to import it"
            hint = f"pip install {package} in the launcher's environment, on every node, or switch it off."
            yield context.finding("error", key, message, hint)


def _training_loop(context: RuleContext) -> Iterator[Finding]:
    """What only the user's own training script can do."""
    if context.target.script:
        return
    yield from _parallelism(context)
    if context.off("managed_gradient_accumulation"):
        message = "the launcher relies on DeepSpeed for accumulation: DeepSpeed would update after every micro-batch"
        yield context.finding("error", "managed_gradient_accumulation", message, f"Remove it, {_SCRIPT}.")
    if context.stage and context.config.get("zero_optimization.zenflow") not in (None, AUTO):
        message = "ZenFlow's intervals, not the batch size, decide after how many micro-batches the weights change"
        hint = "Compare the loss with a run without ZenFlow, or set update_interval to gradient_accumulation_steps."
        yield context.finding("warning", "zero_optimization.zenflow", message, hint)
    for name in ("muon_lr", "adam_lr"):
        if context.config.get(f"optimizer.params.{name}") not in (None, AUTO):
            message = f"a learning rate for some of the parameters: {_ONE_LR}"
            yield context.finding("error", f"optimizer.params.{name}", message, "Remove it and set lr.")
    kind = context.config.get("scheduler.type")
    if (
        not context.stage
        and isinstance(kind, str)
        and kind in context.keys.schedulers
        and kind not in DEEPSPEED_SCHEDULERS
    ):
        message = (
            f"{kind} is a PyTorch scheduler: the launcher can only plan the learning rates of DeepSpeed's schedulers"
        )
        yield context.finding("error", "scheduler.type", message, f"Use one of {', '.join(DEEPSPEED_SCHEDULERS)}.")
    params = context.config.get("scheduler.params")
    for name, value in (params if isinstance(params, dict) else {}).items():
        if isinstance(value, list) and any(one != value[0] for one in value):
            message = f"one value per parameter group: {_ONE_LR}"
            yield context.finding("error", f"scheduler.params.{name}", message, "Write one number.")


def _parallelism(context: RuleContext) -> Iterator[Finding]:
    for path in ("autotp_size", "tp.tp_size", "tensor_parallel.tp_size"):
        size = as_number(context.config.get(f"tensor_parallel.{path}"))
        if size not in (None, AUTO, 0, 1):
            message = f"{size!r} ranks would need the same data, but the launcher gives each rank different data"
            hint = f"Remove it and use ZeRO-3 to partition the model, {_SCRIPT}."
            yield context.finding("error", f"tensor_parallel.{path}", message, hint)
    if context.config.get("pipeline"):
        message = "the launcher does not support pipeline parallelism: its model is not a PipelineModule"
        yield context.finding(
            "error", "pipeline", message, f"Remove it and use ZeRO-3 to partition the model, {_SCRIPT}."
        )
    if context.on("expert_parallel.enabled"):
        message = "the launcher does not support expert parallelism: saving and exporting divided experts is untested"
        yield context.finding("error", "expert_parallel", message, f"Remove it, {_SCRIPT}.")


def _no_effect(context: RuleContext) -> Iterator[Finding]:
    """Blocks that have no effect in a run."""
    for path, message, hint in _NO_EFFECT:
        block = context.config.get(path)
        off = isinstance(block, dict) and as_bool(block.get("enabled")) is False
        wanted = isinstance(block, dict) and any(value not in (False, None) for value in block.values())
        if wanted and not off and not (context.target.script and path not in _NO_EFFECT_IN_SCRIPTS):
            yield context.finding("warning", path, message, hint)


_NO_EFFECT = (
    (
        "activation_checkpointing",
        "has no effect: it configures deepspeed.checkpointing, which transformers models do not call",
        "Set model.gradient_checkpointing: true in the job.",
    ),
    (
        "data_efficiency",
        "has no effect: it needs DeepSpeed's data loader and layers, which the launcher does not use",
        f"Remove it, {_SCRIPT}.",
    ),
    ("autotuning", "has no effect: only the deepspeed command runs the autotuner", "Remove it."),
)
_NO_EFFECT_IN_SCRIPTS = ("autotuning",)

LOOP_RULES: tuple[Rule, ...] = (_packages, _training_loop, _no_effect)
