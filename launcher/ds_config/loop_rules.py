"""What the environment or the training loop lacks for a JSON that DeepSpeed itself takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.ds_config.case import Case, Rule
from launcher.ds_config.catalogue import DEEPSPEED_SCHEDULERS
from launcher.ds_config.facts import AUTO, as_bool, as_number
from launcher.ds_config.findings import Finding

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet-ml"}
"""The package of each monitor; csv_monitor needs none."""
_WITH_MUP = ("muadam", "muadamw", "musgd")
MONITORS_AND_OPTIMIZERS = (*PACKAGES.values(), "mup")
"""Every package that a JSON can need."""
_ONE_RATE = "the launcher's loop gives every parameter group the plan's one learning rate"
_SCRIPT = "or run a script that is made for it with launcher exec"


def needed_packages(data: Mapping[str, Any]) -> dict[str, str]:
    """The packages that DeepSpeed imports because of this JSON, each with the key that asks for it."""
    blocks = {name: data.get(name) for name in PACKAGES}
    found = {
        PACKAGES[name]: f"{name}.enabled"
        for name, block in blocks.items()
        if isinstance(block, dict) and as_bool(block.get("enabled"))
    }
    optimizer = data.get("optimizer")
    kind = str(optimizer.get("type")).lower() if isinstance(optimizer, dict) else ""
    return {**found, **({"mup": "optimizer.type"} if kind in _WITH_MUP else {})}


def _packages(case: Case) -> Iterator[Finding]:
    for package, key in needed_packages(case.config.data).items():
        if package in case.target.missing and key != "optimizer.type":
            message = f"{package} is not installed, and the ranks would fail as they import it"
            hint = f"pip install {package} in the launcher's environment, on every node, or switch it off."
            yield case.found("error", key, message, hint)


def _own_loop(case: Case) -> Iterator[Finding]:
    """Only a script of the user's own can do these."""
    if case.target.script:
        return
    yield from _parallelism(case)
    if case.off("managed_gradient_accumulation"):
        message = "the launcher's loop leaves accumulation to DeepSpeed, which would then step at every micro-batch"
        yield case.found("error", "managed_gradient_accumulation", message, f"Take it out, {_SCRIPT}.")
    if case.stage and case.config.get("zero_optimization.zenflow") not in (None, AUTO):
        message = (
            "ZenFlow's own intervals decide after how many micro-batches weights change, whatever the batch size says"
        )
        hint = "Compare losses with a run without it, or set update_interval to gradient_accumulation_steps."
        yield case.found("warning", "zero_optimization.zenflow", message, hint)
    for name in ("muon_lr", "adam_lr"):
        if case.config.get(f"optimizer.params.{name}") not in (None, AUTO):
            message = f"a learning rate for a part of the parameters: {_ONE_RATE}"
            yield case.found("error", f"optimizer.params.{name}", message, "Take it out, and write lr.")
    kind = case.config.get("scheduler.type")
    if not case.stage and kind in case.keys.schedulers and kind not in DEEPSPEED_SCHEDULERS:
        message = f"{kind} is PyTorch's, and a plan knows the learning rates of DeepSpeed's own schedulers only"
        yield case.found("error", "scheduler.type", message, f"Take one of {', '.join(DEEPSPEED_SCHEDULERS)}.")
    params = case.config.get("scheduler.params")
    for name, value in (params if isinstance(params, dict) else {}).items():
        if isinstance(value, list) and any(one != value[0] for one in value):
            message = f"a value for each parameter group: {_ONE_RATE}"
            yield case.found("error", f"scheduler.params.{name}", message, "Write one number.")


def _parallelism(case: Case) -> Iterator[Finding]:
    for path in ("autotp_size", "tp.tp_size", "tensor_parallel.tp_size"):
        size = as_number(case.config.get(f"tensor_parallel.{path}"))
        if size not in (None, AUTO, 0, 1):
            message = f"{size!r} ranks would have to be given the same data, and the launcher gives each its own"
            hint = f"Take it out and let ZeRO-3 divide the model, {_SCRIPT}."
            yield case.found("error", f"tensor_parallel.{path}", message, hint)
    if case.config.get("pipeline"):
        message = "no pipeline parallelism here: the launcher's model is not a PipelineModule"
        yield case.found("error", "pipeline", message, f"Take it out and let ZeRO-3 divide the model, {_SCRIPT}.")
    if case.on("expert_parallel.enabled"):
        message = "no expert parallelism here: the launcher has not been shown to put divided experts together again"
        yield case.found("error", "expert_parallel", message, f"Take it out, {_SCRIPT}.")


def _idle(case: Case) -> Iterator[Finding]:
    """Blocks that are read, and change nothing in a run."""
    for path, message, hint in _IDLE:
        block = case.config.get(path)
        off = isinstance(block, dict) and as_bool(block.get("enabled")) is False
        wanted = isinstance(block, dict) and any(value not in (False, None) for value in block.values())
        if wanted and not off and not (case.target.script and path not in _IDLE_IN_SCRIPTS):
            yield case.found("warning", path, message, hint)


_IDLE = (
    (
        "activation_checkpointing",
        "has no effect: it configures deepspeed.checkpointing, which models of transformers do not call",
        "Set model.gradient_checkpointing: true in the job.",
    ),
    (
        "data_efficiency",
        "has no effect: it needs DeepSpeed's own data loader and layers, and the launcher has its own",
        f"Take it out, {_SCRIPT}.",
    ),
    ("autotuning", "has no effect: only the deepspeed command tunes", "Take it out."),
)
_IDLE_IN_SCRIPTS = ("autotuning",)

LOOP_RULES: tuple[Rule, ...] = (_packages, _own_loop, _idle)
