"""From the user's JSON and what the plan decided to exactly what deepspeed.initialize is given.

Nothing the user wrote is altered without a `Change`, and a value that the job and the JSON set differently is
an error: neither side wins silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.ds_config.draft import Change, Draft
from launcher.ds_config.facts import (
    AUTO,
    BATCH_KEYS,
    Precision,
    as_bool,
    as_number,
    bf16_key,
    open_scheduler,
    open_warmup,
    precision_of,
    zero_stage,
)
from launcher.ds_config.optimizer_class import ADAM_TYPES, TORCH_ADAM, fills_torch_adam
from launcher.ds_config.read import DsConfig
from launcher.ds_config.target import Device
from launcher.errors import RequestError

# Keys for which "auto" is a value of DeepSpeed's own.
REAL_AUTO = (
    "data_types.keep_in_fp32_modules",
    "pipeline.stages",
    "zero_optimization.zenflow",
    "expert_parallel",
)

# Elements from the hidden size, as transformers' HfTrainerDeepSpeedConfig fills them.
BUCKET_SIZES: dict[str, tuple[str, Callable[[int], int]]] = {
    "reduce_bucket_size": ("hidden size squared", lambda hidden: hidden * hidden),
    "stage3_prefetch_bucket_size": ("0.9 x hidden size squared", lambda hidden: int(0.9 * hidden * hidden)),
    "stage3_param_persistence_threshold": ("10 x hidden size", lambda hidden: 10 * hidden),
}


_GENERATED = "the generated schedule, which the JSON leaves open"


@dataclass(frozen=True)
class Decisions:
    """What the plan decided. `explicit` holds the job keys ("train.train_batch_size") that the user set: only
    they can contradict the JSON; all other decisions yield to it."""

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
    """The JSON for DeepSpeed, without any "auto" left, and how it differs from the user's."""

    config: dict[str, Any]
    changes: tuple[Change, ...]


def compose(user: DsConfig, decisions: Decisions) -> Composed:
    """`user` completed by `decisions`.

    Raises:
        RequestError: job and JSON contradict each other, an "auto" cannot be filled, or the JSON asks for
            what DeepSpeed cannot do on this device. All such problems are listed at once.
    """
    draft = Draft(user)
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
        draft.attempt(partial(step, decisions=decisions))
    if draft.problems:
        raise RequestError(*draft.problems)
    return Composed(draft.config, tuple(draft.changes))


def _batches(draft: Draft, decisions: Decisions) -> None:
    sizes = {key: getattr(decisions, key) for key in BATCH_KEYS}
    micro_batches = sizes["train_micro_batch_size_per_gpu"] * sizes["gradient_accumulation_steps"]
    world = sizes["train_batch_size"] // micro_batches
    reason = "batch {} = micro {} x accumulation {} x world size {}".format(*sizes.values(), world)
    for key, value in sizes.items():
        explicit = f"train.{key}" in decisions.explicit
        draft.settle(key, value, f"train.{key}", explicit, reason)
    batch, micro, accumulation = (draft.get(key) for key in BATCH_KEYS)
    if not draft.problems and batch != micro * accumulation * world:
        message = f"{batch} is not micro-batch {micro} x accumulation {accumulation} x world size {world}"
        hint = 'Write "auto" for one of the three, which is then derived.'
        draft.problems.append(draft.user.problem("train_batch_size", message, hint))


def _sequence_parallel(draft: Draft, decisions: Decisions) -> None:
    """Without this key DeepSpeed counts every rank as one of data parallelism when it loads under ZeRO-3."""
    key, size = "sequence_parallel_size", decisions.sequence_parallel_size
    found, job_key = draft.get(key), f"model.{key}"
    if size is None or (size == 1 and found is None):
        return
    if job_key not in decisions.explicit and found != AUTO and as_number(found) != size:
        message = f"{found!r} here, and the job does not say that ranks share sequences"
        draft.problems.append(draft.user.problem(key, message, f"Set {job_key}: {found} in the job, or take it out."))
    else:
        draft.settle(key, size, job_key, True, f"{size} ranks share each sequence")


def _precision(draft: Draft, decisions: Decisions) -> None:
    asked, fixed = decisions.precision, precision_of(draft.user)
    bf16 = bf16_key(draft.user)
    if fixed is not None and fixed != asked and "model.dtype" in decisions.explicit:
        message = f"the JSON trains in {fixed}, but model.dtype in the job asks for {asked}"
        place = {"bf16": bf16, "fp16": "fp16", "fp32": bf16}[fixed]
        draft.problems.append(draft.user.problem(place, message, 'Set one of the two, or write "enabled": "auto".'))
        return
    chosen = fixed or asked
    for block, name in ((bf16, "bf16"), ("fp16", "fp16")):
        wanted, found = chosen == name, draft.get(f"{block}.enabled")
        if draft.get(block) == AUTO:
            draft.put(block, {"enabled": wanted}, f"precision {chosen}")
        elif found == AUTO or (wanted and not as_bool(found)):
            _switch(draft, block, wanted, f"precision {chosen}")
        elif found is not None and not isinstance(found, bool) and as_bool(found) is not None:
            draft.put(f"{block}.enabled", as_bool(found), "as DeepSpeed reads it")


def _switch(draft: Draft, block: str, on: bool, reason: str) -> None:
    found = draft.get(f"{block}.enabled")
    if as_bool(found) is False:
        message = f"switched off here, but the plan needs {block}"
        draft.problems.append(
            draft.user.problem(f"{block}.enabled", message, 'Write "auto" here, or set model.dtype in the job.')
        )
    else:
        draft.put(f"{block}.enabled", on, reason)


def _clipping(draft: Draft, decisions: Decisions) -> None:
    key = "train.gradient_clipping"
    explicit = key in decisions.explicit
    normless = as_bool(draft.get("zero_optimization.compute_grad_norm")) is False
    if normless and not explicit and draft.get("gradient_clipping") in (None, AUTO):
        reason = "compute_grad_norm is false, and clipping needs the norm: gradients are not clipped"
        draft.put("gradient_clipping", 0.0, reason)
        return
    reason = "the global gradient norm is held below this"
    draft.settle("gradient_clipping", decisions.gradient_clipping, key, explicit, reason)


def _optimizer(draft: Draft, decisions: Decisions) -> None:
    block = draft.get("optimizer")
    if block is None or block == AUTO:
        draft.put("optimizer", decisions.optimizer, "the plan's optimizer; the JSON names none")
    else:
        _complete_optimizer(draft, decisions)
    _torch_adam(draft, decisions)


def _complete_optimizer(draft: Draft, decisions: Decisions) -> None:
    if draft.get("optimizer.params") == AUTO:
        draft.drop("optimizer.params", "left open: what the plan decides follows")
    if draft.get("optimizer.type") in (None, AUTO):
        draft.put("optimizer.type", decisions.optimizer["type"], "the plan's optimizer")
    adam = str(draft.get("optimizer.type")).lower() in ADAM_TYPES
    for name, value in decisions.optimizer.get("params", {}).items():
        path, job_key = f"optimizer.params.{name}", "schedule.peak_lr" if name == "lr" else f"train.{name}"
        explicit = job_key in decisions.explicit
        # Other optimizers keep defaults of their own where the user says nothing.
        if adam or name == "lr" or explicit or draft.get(path) is not None:
            value = list(value) if isinstance(value, tuple) else value
            draft.settle(path, value, job_key, explicit, f"{job_key}, which the JSON leaves open")
    for name in draft.get("optimizer.params") or {}:
        draft.as_number(f"optimizer.params.{name}")


def _torch_adam(draft: Draft, decisions: Decisions) -> None:
    adam = str(draft.get("optimizer.type")).lower() in ADAM_TYPES
    if adam and fills_torch_adam(draft.user, decisions.device):
        reason = "on a CPU PyTorch's own Adam is used: DeepSpeed's would be compiled at the first start"
        draft.put(TORCH_ADAM, True, reason)


def _scheduler(draft: Draft, decisions: Decisions) -> None:
    generated, block = decisions.scheduler, draft.get("scheduler")
    asked_for = "schedule.shape" in decisions.explicit
    if block is None or _wholly_open(block):
        if generated is not None:
            draft.put("scheduler", generated, "the generated schedule")
        elif block is not None:
            draft.drop("scheduler", "the launcher brings its own schedule object")
    elif generated is None and asked_for:
        draft.drop("scheduler", "schedule.shape in the job asks for a generated schedule, which is an object")
    elif generated is not None and asked_for:
        draft.put("scheduler", generated, "schedule.shape in the job asks for the generated schedule")
    elif draft.get("scheduler.type") in (None, AUTO):
        hint = 'Write its type, such as "WarmupDecayLR", or "auto" for all of them.'
        draft.problems.append(draft.user.problem("scheduler.type", "params are given, and no type that has them", hint))
    else:
        _complete_scheduler(draft, decisions)


def _wholly_open(block: Any) -> bool:
    """Whether a scheduler block says nothing at all: neither a type nor the value of a parameter."""
    if not isinstance(block, dict):
        return bool(block == AUTO)
    params = block.get("params")
    values = list(params.values()) if isinstance(params, dict) else [params or AUTO]
    return block.get("type") in (None, AUTO) and all(value == AUTO for value in values)


def _complete_scheduler(draft: Draft, decisions: Decisions) -> None:
    """Fills the "auto" in a scheduler that the user wrote, and holds its length against the job's."""
    known = _schedule_values(draft, decisions)
    if draft.get("scheduler.params") == AUTO:
        draft.drop("scheduler.params", "left open: what the generated schedule has follows")
    if decisions.scheduler and open_scheduler(draft.user):
        for name, value in decisions.scheduler["params"].items():
            path = f"scheduler.params.{name}"
            zero = draft.get(path) not in (None, AUTO, value)
            reason = "the warm-up begins with its first step: no update is spent at rate 0" if zero else _GENERATED
            draft.put(path, value, reason)
    elif open_warmup(draft.user):
        reason = "the warm-up is left open, and DeepSpeed's own default is the steep log ramp"
        draft.put("scheduler.params.warmup_type", "linear", reason)
    for name, value in list((draft.get("scheduler.params") or {}).items()):
        path = f"scheduler.params.{name}"
        if value == AUTO and known.get(name) is not None:
            draft.put(path, known[name], "from the plan's schedule")
        elif value != AUTO:
            draft.as_number(path)
    _same_length(draft, decisions)


def _schedule_values(draft: Draft, decisions: Decisions) -> dict[str, Any]:
    values: dict[str, Any] = {"warmup_min_lr": 0.0, "warmup_max_lr": draft.get("optimizer.params.lr")}
    values |= {"warmup_min_ratio": 0.0, "warmup_type": "linear", "last_batch_iteration": -1}
    values |= {"total_num_steps": decisions.total_num_steps, "warmup_num_steps": decisions.warmup_num_steps}
    generated: dict[str, Any] = (decisions.scheduler or {}).get("params", {})
    return values | generated


def _same_length(draft: Draft, decisions: Decisions) -> None:
    """The JSON's own scheduler must agree with the keys that the job sets."""
    values = _schedule_values(draft, decisions)
    job_keys = {"total_num_steps": "train.max_steps", "warmup_num_steps": "schedule.warmup"}
    for name, job_key in (job_keys | {"warmup_max_lr": "schedule.peak_lr"}).items():
        path, wanted = f"scheduler.params.{name}", values.get(name)
        if draft.get(path) is not None and wanted is not None and job_key in decisions.explicit:
            draft.settle(path, wanted, job_key, True, "")


def _zero(draft: Draft, decisions: Decisions) -> None:
    stage = zero_stage(draft.user)
    if draft.get("zero_optimization.stage") == AUTO:
        draft.put("zero_optimization.stage", stage, "no stage was chosen: DeepSpeed's default")
    _bucket_sizes(draft, decisions.hidden_size)
    gather = _written(draft, "stage3_gather_16bit_weights_on_model_save")
    old_name = "zero_optimization.stage3_gather_fp16_weights_on_model_save"
    if stage == 3 and draft.get(gather) in (None, AUTO) and draft.get(old_name) is None:
        draft.put(gather, True, "for save_16bit_model in scripts; the launcher's own export gathers without it")


def _written(draft: Draft, key: str) -> str:
    """Where the JSON has a key of the ZeRO block: DeepSpeed takes stage3_ with and without it, and refuses both."""
    path, short = (f"zero_optimization.{name}" for name in (key, key.removeprefix("stage3_")))
    return short if draft.get(path) is None and draft.get(short) is not None else path


def _bucket_sizes(draft: Draft, hidden: int | None) -> None:
    for key, (words, elements) in BUCKET_SIZES.items():
        path = _written(draft, key)
        if draft.get(path) != AUTO:
            continue
        if hidden is None:
            message = "\"auto\" needs the model's hidden size, and the model's config names none"
            draft.problems.append(draft.user.problem(path, message, "Write a number of elements, such as 5e7."))
        else:
            draft.put(path, elements(hidden), words)


def _printing(draft: Draft, decisions: Decisions) -> None:
    del decisions
    draft.as_number("steps_per_print")
    if draft.get("steps_per_print") == math.inf:
        draft.put("steps_per_print", None, "never: null means that in JSON, which has no infinity")


def _device_limits(draft: Draft, decisions: Decisions) -> None:
    """What DeepSpeed's CPU backend cannot do and the job can ask for; what the JSON asks for is lint's to refuse."""
    if decisions.device != "cpu":
        return
    if as_bool(draft.get("fp16.enabled")):
        draft.problems.append(draft.user.problem("fp16.enabled", "DeepSpeed has no fp16 on a CPU", "Use bf16 or fp32."))


def _leftover_autos(draft: Draft, decisions: Decisions) -> None:
    del decisions
    for path in _auto_paths(draft.config):
        if path.startswith(REAL_AUTO):
            continue
        if path.startswith(("optimizer.", "scheduler.")):
            message = '"auto" cannot be filled here: the plan has no such value'
            draft.problems.append(draft.user.problem(path, message, "Write a value, or leave the key out."))
        else:
            draft.drop(path, '"auto" is left to DeepSpeed\'s default')


def _auto_paths(node: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in node.items():
        if value == AUTO:
            paths.append(prefix + key)
        elif isinstance(value, dict):
            paths.extend(_auto_paths(value, f"{prefix}{key}."))
    return paths
