"""Completes the user's JSON with the plan's decisions: the result goes to deepspeed.initialize unchanged.

Every difference from the user's JSON is recorded as a `Change`. A value that the job and the JSON set differently is an
error: neither wins silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.ds_config.config_builder import Change, ConfigBuilder
from launcher.ds_config.facts import (
    AUTO,
    BATCH_KEYS,
    Precision,
    as_bool,
    as_number,
    auto_scheduler,
    bf16_key,
    has_auto_warmup,
    precision_of,
    zero_stage,
)
from launcher.ds_config.optimizer_class import ADAM_TYPES, TORCH_ADAM, fills_torch_adam
from launcher.ds_config.read import DsConfig
from launcher.ds_config.target import Device
from launcher.errors import RequestError

# Keys for which DeepSpeed itself accepts "auto".
REAL_AUTO = (
    "data_types.keep_in_fp32_modules",
    "pipeline.stages",
    "zero_optimization.zenflow",
    "expert_parallel",
)

# Number of elements from the hidden size, as in transformers' HfTrainerDeepSpeedConfig.
BUCKET_SIZES: dict[str, tuple[str, Callable[[int], int]]] = {
    "reduce_bucket_size": ("hidden size squared", lambda hidden: hidden * hidden),
    "stage3_prefetch_bucket_size": ("0.9 x hidden size squared", lambda hidden: int(0.9 * hidden * hidden)),
    "stage3_param_persistence_threshold": ("10 x hidden size", lambda hidden: 10 * hidden),
}


_GENERATED = "from the generated schedule: the JSON does not set it"


@dataclass(frozen=True)
class Decisions:
    """What the plan decided. `explicit`: the job keys ("train.train_batch_size") that the user set. Only they can
    contradict the JSON; for all others the JSON's value wins."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    precision: Precision
    device: Device
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    gradient_clipping: float
    hidden_size: int | None
    explicit: frozenset[str] = frozenset()
    total_num_steps: int | None = None
    warmup_num_steps: int | None = None
    sequence_parallel_size: int | None = None


@dataclass(frozen=True)
class Composed:
    """The JSON for DeepSpeed, with no "auto" left, and its changes from the user's."""

    config: dict[str, Any]
    changes: tuple[Change, ...]


def compose(user: DsConfig, decisions: Decisions) -> Composed:
    """`user` completed by `decisions`.

    Raises:
        RequestError: job and JSON contradict each other, an "auto" cannot be filled, or DeepSpeed does not support
            the JSON on this device. It lists all such problems.
    """
    builder = ConfigBuilder(user)
    for step in (
        _batches,
        _sequence_parallel,
        _precision,
        _clipping,
        _optimizer,
        _scheduler,
        _zero,
        _printing,
        _device_limits,
        _leftover_autos,
    ):
        builder.run(partial(step, decisions=decisions))
    if builder.problems:
        raise RequestError(*builder.problems)
    return Composed(builder.config, tuple(builder.changes))


def _batches(builder: ConfigBuilder, decisions: Decisions) -> None:
    sizes = {key: getattr(decisions, key) for key in BATCH_KEYS}
    micro_batches = sizes["train_micro_batch_size_per_gpu"] * sizes["gradient_accumulation_steps"]
    world = sizes["train_batch_size"] // micro_batches
    reason = "batch {} = micro {} x accumulation {} x world size {}".format(*sizes.values(), world)
    for key, value in sizes.items():
        explicit = f"train.{key}" in decisions.explicit
        builder.fill(key, value, f"train.{key}", explicit, reason)
    batch, micro, accumulation = (builder.get(key) for key in BATCH_KEYS)
    if not builder.problems and batch != micro * accumulation * world:
        message = f"{batch} is not micro-batch {micro} x accumulation {accumulation} x world size {world}"
        hint = 'Write "auto" for one of the three, and the launcher computes it.'
        builder.problems.append(builder.user.problem("train_batch_size", message, hint))


def _sequence_parallel(builder: ConfigBuilder, decisions: Decisions) -> None:
    """Without this key DeepSpeed counts all ranks as data-parallel when it loads a model under ZeRO-3."""
    key, size = "sequence_parallel_size", decisions.sequence_parallel_size
    found, job_key = builder.get(key), f"model.{key}"
    if size is None or (size == 1 and found is None):
        return
    if job_key not in decisions.explicit and found != AUTO and as_number(found) != size:
        message = f"found {found!r}, but the job does not set {job_key}"
        builder.problems.append(
            builder.user.problem(key, message, f"Set {job_key}: {found} in the job, or remove it here.")
        )
    else:
        builder.fill(key, size, job_key, True, f"{size} ranks share each sequence")


def _precision(builder: ConfigBuilder, decisions: Decisions) -> None:
    requested, fixed = decisions.precision, precision_of(builder.user)
    bf16 = bf16_key(builder.user)
    if fixed is not None and fixed != requested and "model.dtype" in decisions.explicit:
        message = f"the JSON sets {fixed}, but model.dtype in the job sets {requested}"
        key = {"bf16": bf16, "fp16": "fp16", "fp32": bf16}[fixed]
        builder.problems.append(builder.user.problem(key, message, 'Set one of the two, or write "enabled": "auto".'))
        return
    chosen = fixed or requested
    for block, name in ((bf16, "bf16"), ("fp16", "fp16")):
        wanted, found = chosen == name, builder.get(f"{block}.enabled")
        if builder.get(block) == AUTO:
            builder.set(block, {"enabled": wanted}, f"precision {chosen}")
        elif found == AUTO or (wanted and not as_bool(found)):
            _switch(builder, block, wanted, f"precision {chosen}")
        elif found is not None and not isinstance(found, bool) and as_bool(found) is not None:
            builder.set(f"{block}.enabled", as_bool(found), "as DeepSpeed reads it")


def _switch(builder: ConfigBuilder, block: str, on: bool, reason: str) -> None:
    found = builder.get(f"{block}.enabled")
    if as_bool(found) is False:
        message = f"off here, but the plan needs {block}"
        builder.problems.append(
            builder.user.problem(f"{block}.enabled", message, 'Write "auto" here, or set model.dtype in the job.')
        )
    else:
        builder.set(f"{block}.enabled", on, reason)


def _clipping(builder: ConfigBuilder, decisions: Decisions) -> None:
    key = "train.gradient_clipping"
    explicit = key in decisions.explicit
    normless = as_bool(builder.get("zero_optimization.compute_grad_norm")) is False
    if normless and not explicit and builder.get("gradient_clipping") in (None, AUTO):
        reason = "compute_grad_norm is false, so gradients are not clipped: clipping needs the norm"
        builder.set("gradient_clipping", 0.0, reason)
        return
    reason = "the largest global gradient norm"
    builder.fill("gradient_clipping", decisions.gradient_clipping, key, explicit, reason)


def _optimizer(builder: ConfigBuilder, decisions: Decisions) -> None:
    block = builder.get("optimizer")
    if block is None or block == AUTO:
        builder.set("optimizer", decisions.optimizer, "the plan's optimizer: the JSON has none")
    else:
        _complete_optimizer(builder, decisions)
    _torch_adam(builder, decisions)


def _complete_optimizer(builder: ConfigBuilder, decisions: Decisions) -> None:
    if builder.get("optimizer.params") == AUTO:
        builder.remove("optimizer.params", "auto: the plan fills the parameters")
    if builder.get("optimizer.type") in (None, AUTO):
        builder.set("optimizer.type", decisions.optimizer["type"], "the plan's optimizer")
    adam = str(builder.get("optimizer.type")).lower() in ADAM_TYPES
    for name, value in decisions.optimizer.get("params", {}).items():
        path, job_key = f"optimizer.params.{name}", "schedule.peak_lr" if name == "lr" else f"train.{name}"
        explicit = job_key in decisions.explicit
        # Other optimizers keep their own defaults unless the user sets a value.
        if adam or name == "lr" or explicit or builder.get(path) is not None:
            value = list(value) if isinstance(value, tuple) else value
            builder.fill(path, value, job_key, explicit, f"from {job_key}: the JSON does not set it")
    for name in builder.get("optimizer.params") or {}:
        builder.convert_number(f"optimizer.params.{name}")


def _torch_adam(builder: ConfigBuilder, decisions: Decisions) -> None:
    adam = str(builder.get("optimizer.type")).lower() in ADAM_TYPES
    if adam and fills_torch_adam(builder.user, decisions.device):
        reason = "on CPUs the launcher uses PyTorch's Adam: DeepSpeed's is compiled at the first start"
        builder.set(TORCH_ADAM, True, reason)


def _scheduler(builder: ConfigBuilder, decisions: Decisions) -> None:
    generated, block = decisions.scheduler, builder.get("scheduler")
    explicit = "schedule.shape" in decisions.explicit
    if block is None or _is_empty_block(block):
        if generated is not None:
            builder.set("scheduler", generated, "the generated schedule")
        elif block is not None:
            builder.remove("scheduler", "the launcher passes its own scheduler object")
    elif generated is None and (explicit or auto_scheduler(builder.user)):
        key = "schedule.shape" if explicit else "schedule.floor"
        builder.remove("scheduler", f"{key} in the job sets a generated schedule, which is passed as an object")
    elif generated is not None and explicit:
        builder.set("scheduler", generated, "schedule.shape in the job sets the generated schedule")
    elif builder.get("scheduler.type") in (None, AUTO):
        hint = 'Write a type, such as "WarmupDecayLR", or "auto" for all params.'
        builder.problems.append(builder.user.problem("scheduler.type", "params are set without a type", hint))
    else:
        _complete_scheduler(builder, decisions)


def _is_empty_block(block: Any) -> bool:
    """Whether a scheduler block sets neither a type nor a parameter."""
    if not isinstance(block, dict):
        return bool(block == AUTO)
    params = block.get("params")
    values = list(params.values()) if isinstance(params, dict) else [params or AUTO]
    return block.get("type") in (None, AUTO) and all(value == AUTO for value in values)


def _complete_scheduler(builder: ConfigBuilder, decisions: Decisions) -> None:
    """Fills the "auto" values of the user's scheduler, and checks its length against the job's."""
    known = _schedule_values(builder, decisions)
    if builder.get("scheduler.params") == AUTO:
        builder.remove("scheduler.params", "auto: the plan fills the parameters")
    if decisions.scheduler and auto_scheduler(builder.user):
        for name, value in decisions.scheduler["params"].items():
            path = f"scheduler.params.{name}"
            zero = builder.get(path) not in (None, AUTO, value)
            reason = "the warm-up starts above 0: no update has a learning rate of 0" if zero else _GENERATED
            builder.set(path, value, reason)
    elif has_auto_warmup(builder.user):
        reason = "the JSON does not set the warm-up, and DeepSpeed's default is the steep log ramp"
        builder.set("scheduler.params.warmup_type", "linear", reason)
    for name, value in list((builder.get("scheduler.params") or {}).items()):
        path = f"scheduler.params.{name}"
        if value == AUTO and known.get(name) is not None:
            builder.set(path, known[name], "from the plan's schedule")
        elif value != AUTO:
            builder.convert_number(path)
    _same_length(builder, decisions)


def _schedule_values(builder: ConfigBuilder, decisions: Decisions) -> dict[str, Any]:
    values: dict[str, Any] = {"warmup_min_lr": 0.0, "warmup_max_lr": builder.get("optimizer.params.lr")}
    values |= {"warmup_min_ratio": 0.0, "warmup_type": "linear", "last_batch_iteration": -1}
    values |= {"total_num_steps": decisions.total_num_steps, "warmup_num_steps": decisions.warmup_num_steps}
    generated: dict[str, Any] = (decisions.scheduler or {}).get("params", {})
    return values | generated


def _same_length(builder: ConfigBuilder, decisions: Decisions) -> None:
    """Checks the JSON's scheduler against the keys that the job sets."""
    values = _schedule_values(builder, decisions)
    job_keys = {"total_num_steps": "train.max_steps", "warmup_num_steps": "schedule.warmup"}
    for name, job_key in (job_keys | {"warmup_max_lr": "schedule.peak_lr"}).items():
        path, wanted = f"scheduler.params.{name}", values.get(name)
        if builder.get(path) is not None and wanted is not None and job_key in decisions.explicit:
            builder.fill(path, wanted, job_key, True, "")


def _zero(builder: ConfigBuilder, decisions: Decisions) -> None:
    stage = zero_stage(builder.user)
    if builder.get("zero_optimization.stage") == AUTO:
        builder.set("zero_optimization.stage", stage, "no stage is set: DeepSpeed's default")
    _bucket_sizes(builder, decisions.hidden_size)
    gather = _written(builder, "stage3_gather_16bit_weights_on_model_save")
    old_name = "zero_optimization.stage3_gather_fp16_weights_on_model_save"
    if stage == 3 and builder.get(gather) in (None, AUTO) and builder.get(old_name) is None:
        builder.set(gather, True, "for save_16bit_model in scripts; the launcher's export does not need it")


def _written(builder: ConfigBuilder, key: str) -> str:
    """The path of a ZeRO key as the JSON spells it: DeepSpeed accepts it with or without stage3_, not both."""
    path, short = (f"zero_optimization.{name}" for name in (key, key.removeprefix("stage3_")))
    return short if builder.get(path) is None and builder.get(short) is not None else path


def _bucket_sizes(builder: ConfigBuilder, hidden: int | None) -> None:
    for key, (words, elements) in BUCKET_SIZES.items():
        path = _written(builder, key)
        if builder.get(path) != AUTO:
            continue
        if hidden is None:
            message = "\"auto\" needs the model's hidden size, which the model's config does not have"
            builder.problems.append(builder.user.problem(path, message, "Write a number of elements, such as 5e7."))
        else:
            builder.set(path, elements(hidden), words)


def _printing(builder: ConfigBuilder, decisions: Decisions) -> None:
    del decisions
    builder.convert_number("steps_per_print")
    if builder.get("steps_per_print") == math.inf:
        builder.set("steps_per_print", None, "null means never: JSON has no infinity")


def _device_limits(builder: ConfigBuilder, decisions: Decisions) -> None:
    """Rejects fp16 on CPUs when the job sets it; lint rejects it in the JSON."""
    if decisions.device != "cpu":
        return
    if as_bool(builder.get("fp16.enabled")):
        builder.problems.append(
            builder.user.problem("fp16.enabled", "DeepSpeed does not support fp16 on CPUs", "Use bf16 or fp32.")
        )


def _leftover_autos(builder: ConfigBuilder, decisions: Decisions) -> None:
    del decisions
    for path in _auto_paths(builder.config):
        if path.startswith(REAL_AUTO):
            continue
        if path.startswith(("optimizer.", "scheduler.")):
            message = '"auto" cannot be filled here: the plan has no value for it'
            builder.problems.append(builder.user.problem(path, message, "Write a value, or leave the key out."))
        else:
            builder.remove(path, '"auto": DeepSpeed\'s default applies')


def _auto_paths(node: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in node.items():
        if value == AUTO:
            paths.append(prefix + key)
        elif isinstance(value, dict):
            paths.extend(_auto_paths(value, f"{prefix}{key}."))
    return paths
