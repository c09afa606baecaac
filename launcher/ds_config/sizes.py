"""The sizes in a DeepSpeed JSON that affect memory, with DeepSpeed's defaults for missing keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.ds_config.compose import BUCKET_SIZES
from launcher.ds_config.facts import (
    AUTO,
    Offload,
    as_bool,
    as_number,
    bf16_key,
    offload,
    parse_dtype,
    zero_stage,
    zero_value,
)
from launcher.ds_config.read import DsConfig


@dataclass(frozen=True)
class ZeroSizes:
    """The ZeRO block for the memory estimate. Sizes are numbers of elements; defaults are those of DeepSpeed 0.19."""

    stage: int = 0
    offload: Offload = field(default_factory=Offload)
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    hpz_partition_size: int = 1
    """The ranks that share ZeRO++'s secondary copy of the weights; with 0 or 1 there is no copy."""
    pinned: bool = True
    nvme_optimizer_buffers: int = 4
    nvme_parameter_elements: int = 5 * 100_000_000
    """Buffers for parameters on NVMe: number times size."""
    accumulation_bytes: int | None = None
    """Per element of an accumulated gradient, from data_types.grad_accum_dtype; None: as the weights."""
    master_bytes: int = 4
    """Per offloaded master weight, and per its gradient: 2 with bf16_master_weights_and_grads."""
    moments_bytes: int = 8
    """Of Adam's two offloaded moments together, per element: 4 with bf16_optimizer_states."""


def zero_sizes(user: DsConfig, hidden_size: int) -> ZeroSizes:
    """The sizes of `user` as `compose` completes it. Raises RequestError for an invalid stage."""
    stage = zero_stage(user)
    size = _SizeReader(user, hidden_size)
    overlap = as_bool(user.get("zero_optimization.overlap_comm"))
    return ZeroSizes(
        stage=stage,
        offload=offload(user),
        reduce_bucket_size=size("reduce_bucket_size", 500_000_000),
        overlap_comm=stage == 3 if overlap is None else overlap,
        prefetch_bucket_size=size("stage3_prefetch_bucket_size", 50_000_000),
        persistence_threshold=size("stage3_param_persistence_threshold", 100_000),
        max_live_parameters=size("stage3_max_live_parameters", 1_000_000_000),
        max_reuse_distance=size("stage3_max_reuse_distance", 1_000_000_000),
        sub_group_size=size("sub_group_size", 1_000_000_000),
        hpz_partition_size=size("zero_hpz_partition_size", 1),
        pinned=as_bool(user.get("zero_optimization.offload_optimizer.pin_memory")) is not False,
        nvme_optimizer_buffers=size("offload_optimizer.buffer_count", 4),
        nvme_parameter_elements=size("offload_param.buffer_count", 5) * size("offload_param.buffer_size", 100_000_000),
        accumulation_bytes=_WIDTHS.get(parse_dtype(user.get("data_types.grad_accum_dtype")) or ""),
        master_bytes=2 if any(_on(user, path) for path in _LOW_PRECISION_MASTERS) else 4,
        moments_bytes=4 if _on(user, "bf16.bf16_optimizer_states") else 8,
    )


_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_LOW_PRECISION_MASTERS = ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads")


def _on(user: DsConfig, path: str) -> bool:
    """Whether a switch is on in a precision block that is itself on."""
    block, _, name = path.partition(".")
    block = bf16_key(user) if block == "bf16" else block
    return as_bool(user.get(f"{block}.enabled")) is not False and as_bool(user.get(f"{block}.{name}")) is True


class _SizeReader:
    """Reads numbers of the ZeRO block: "auto" from the hidden size; the default if missing or not a number."""

    def __init__(self, user: DsConfig, hidden_size: int) -> None:
        self._user, self._hidden = user, hidden_size

    def __call__(self, key: str, default: int) -> int:
        value: Any = zero_value(self._user, key)
        if value == AUTO and key in BUCKET_SIZES:
            return BUCKET_SIZES[key][1](self._hidden)
        number = as_number(value)
        return int(number) if isinstance(number, int | float) and not isinstance(number, bool) else default
