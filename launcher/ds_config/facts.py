"""The values that a DeepSpeed JSON sets, for the planner: None for "auto" and missing keys."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

from launcher.ds_config.read import DsConfig
from launcher.errors import RequestError

Precision = Literal["fp32", "bf16", "fp16"]
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
AUTO = "auto"


@dataclass(frozen=True)
class Offload:
    """Where optimizer states and parameters are kept; "none" means on the GPU."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    parameters: Literal["none", "cpu", "nvme"] = "none"


def as_number(value: Any) -> Any:
    """Converts text with a finite number ("1e-5", a string in YAML 1.1) to the number; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def as_bool(value: Any) -> bool | None:
    """A boolean as pydantic reads it in DeepSpeed's blocks: true, 1, "true", "yes", "on"; None if it is not one."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "1", "yes", "on", "t", "y"):
        return True
    return False if word in (False, "false", "0", "no", "off", "f", "n") else None


_DTYPES = {
    **dict.fromkeys(("torch.float16", "fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("torch.float32", "fp32", "float32", "float"), "fp32"),
    **dict.fromkeys(("torch.bfloat16", "bf16", "bfloat16"), "bf16"),
}


def parse_dtype(value: Any) -> str | None:
    """bf16, fp16 or fp32 for a name in DeepSpeed's DtypeEnum; None for any other value."""
    return _DTYPES.get(value) if isinstance(value, str) else None


def has_auto(value: Any) -> bool:
    """Whether a value is "auto", or a list with "auto" in it, such as betas: ["auto", "auto"]."""
    return bool(value == AUTO or (isinstance(value, list) and AUTO in value))


def batch_keys(user: DsConfig) -> dict[str, int]:
    """The batch sizes that the JSON sets, of DeepSpeed's three.

    Raises:
        RequestError: one of them is not a whole number above 0.
    """
    found = {key: as_number(user.get(key)) for key in BATCH_KEYS}
    found = {key: value for key, value in found.items() if value is not None and value != AUTO}
    wrong = [key for key, value in found.items() if type(value) is not int or value < 1]
    if wrong:
        message = 'expected a whole number above 0 or "auto", found {!r}'
        raise RequestError(*(user.problem(key, message.format(user.get(key))) for key in wrong))
    return found


def optimizer_of(user: DsConfig) -> dict[str, Any] | None:
    """The optimizer's {"type", "params"} without the params that are "auto"; None if the JSON has no optimizer."""
    return _block(user, "optimizer")


def scheduler_of(user: DsConfig) -> dict[str, Any] | None:
    """The scheduler's {"type", "params"} without the params that are "auto".

    None if the JSON has no scheduler or its type is "auto".
    """
    return None if user.get("scheduler.type") == AUTO else _block(user, "scheduler")


def auto_scheduler(user: DsConfig) -> str | None:
    """The type of a scheduler whose params are all "auto", as in transformers' templates; else None.

    A start at update 0 or at a learning rate of 0 counts as "auto": these are DeepSpeed's defaults.
    """
    kind, params = user.get("scheduler.type"), user.get("scheduler.params")
    if not isinstance(kind, str) or not isinstance(params, dict):
        return kind if isinstance(kind, str) and params == AUTO else None
    explicit = [name for name, value in params.items() if value != AUTO and value != _STARTS.get(name, AUTO)]
    return kind if AUTO in params.values() and not explicit else None


def has_auto_warmup(user: DsConfig) -> bool:
    """Whether the plan sets both length and type of a scheduler's warm-up.

    A user who sets the length but not the type gets DeepSpeed's default type, the steep log ramp.
    """
    params = user.get("scheduler.params")
    if not isinstance(params, dict) or not str(user.get("scheduler.type")).startswith("Warmup"):
        return False
    return params.get("warmup_num_steps") == AUTO and params.get("warmup_type") in (None, AUTO)


_STARTS = {"last_batch_iteration": -1, "warmup_min_lr": 0, "warmup_min_ratio": 0}
"""The params that set the start of a warm-up, with DeepSpeed's defaults."""


def zero_stage(user: DsConfig) -> int:
    """The ZeRO stage; 0 if the JSON sets none.

    Raises:
        RequestError: it is not one of 0, 1, 2 and 3.
    """
    block = user.get("zero_optimization")
    if isinstance(block, bool):
        return int(block)
    stage = as_number(user.get("zero_optimization.stage", 0))
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3, AUTO):
        message = f"expected a ZeRO stage of 0, 1, 2 or 3, found {stage!r}"
        raise RequestError(user.problem("zero_optimization.stage", message))
    return 0 if stage == AUTO else int(stage)


def zero_value(user: DsConfig, key: str) -> Any:
    """The value of a ZeRO key, spelled with or without stage3_; None if it is missing."""
    found = user.get(f"zero_optimization.{key}")
    return user.get(f"zero_optimization.{key.removeprefix('stage3_')}") if found is None else found


def offload(user: DsConfig) -> Offload:
    """Where optimizer states and parameters are kept; the deprecated cpu_offload keys count."""
    zero = user.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    return Offload(
        optimizer=_device(zero.get("offload_optimizer"), zero.get("cpu_offload")),
        parameters=_device(zero.get("offload_param"), zero.get("cpu_offload_param")),
    )


def clipping_of(user: DsConfig) -> float | None:
    """The gradient norm that the JSON clips at, or None."""
    value = as_number(user.get("gradient_clipping"))
    if value is None or value == AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise RequestError(user.problem("gradient_clipping", f"expected a number of at least 0, found {value!r}"))
    return float(value)


def bf16_key(user: DsConfig) -> str:
    """The name of the bfloat16 block: DeepSpeed reads the old name "bfloat16" if "bf16" is missing."""
    return "bfloat16" if "bf16" not in user.data and "bfloat16" in user.data else "bf16"


def precision_of(user: DsConfig) -> Precision | None:
    """The precision of parameters and gradients that the JSON sets, or None.

    torch_autocast keeps the parameters in fp32.

    Raises:
        RequestError: fp16 and bf16 are both on.
    """
    on = {name: as_bool(user.get(f"{block}.enabled")) for name, block in (("bf16", bf16_key(user)), ("fp16", "fp16"))}
    if on["bf16"] and on["fp16"]:
        message = "fp16 and bf16 are both on: DeepSpeed accepts only one of them"
        raise RequestError(user.problem("fp16.enabled", message, "Switch fp16 off if the hardware supports bf16."))
    if on["bf16"]:
        return "bf16"
    if on["fp16"]:
        return "fp16"
    if (on["bf16"] is False and on["fp16"] in (False, None)) or as_bool(user.get("torch_autocast.enabled")):
        return "fp32"
    return None


def _block(user: DsConfig, name: str) -> dict[str, Any] | None:
    block = user.get(name)
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return None
    params = block.get("params")
    numbers = {k: as_number(v) for k, v in (params if isinstance(params, dict) else {}).items() if not has_auto(v)}
    return {"type": block["type"], "params": copy.deepcopy(numbers)}


def _device(block: Any, deprecated: Any) -> Literal["none", "cpu", "nvme"]:
    device = block.get("device") if isinstance(block, dict) else None
    if device == "nvme":
        return "nvme"
    return "cpu" if device == "cpu" or (device is None and as_bool(deprecated)) else "none"
