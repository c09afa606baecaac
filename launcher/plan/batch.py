"""Batch arithmetic: train_batch_size = micro-batch x accumulation x world size, the missing ones derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import Problem, RequestError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
TARGET_BATCH = 32
"""Sequences an update where nobody says: small enough for small data, large enough for a calm gradient."""


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes; they multiply out with the world size."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int


def resolve_batch(given: Mapping[str, int], world_size: int, fits: Callable[[int], bool]) -> BatchSizes:
    """The three sizes from those of them that are `given`.

    `fits(micro)` says whether a micro-batch fits the memory; where the micro-batch is free, the largest that fits and
    divides is taken (at most 16). Raises RequestError where the sizes cannot multiply out.
    """
    batch, micro, accumulation = (given.get(key) for key in KEYS)
    if batch is None:
        micro = micro or _largest(fits, None)
        accumulation = accumulation or max(1, round(TARGET_BATCH / (micro * world_size)))
        return BatchSizes(micro * accumulation * world_size, micro, accumulation)
    if micro is not None and accumulation is not None:
        return _all_three(batch, micro, accumulation, world_size)
    per_rank = _divide(batch, world_size, "the world size", world_size)
    if accumulation is not None:
        derived = _divide(per_rank, accumulation, "gradient_accumulation_steps", world_size)
        return BatchSizes(batch, derived, accumulation)
    if micro is not None:
        return BatchSizes(batch, micro, _divide(per_rank, micro, "train_micro_batch_size_per_gpu", world_size))
    micro = _largest(fits, per_rank)
    return BatchSizes(batch, micro, per_rank // micro)


def _all_three(batch: int, micro: int, accumulation: int, world_size: int) -> BatchSizes:
    product = micro * accumulation * world_size
    if batch == product:
        return BatchSizes(batch, micro, accumulation)
    derived, rest = divmod(batch, micro * world_size)
    mend = f"make it {product}"
    if not rest:
        mend += f", or leave gradient_accumulation_steps out: it comes to {derived}"
    raise RequestError(
        Problem(
            f"train_batch_size {batch} is not micro-batch {micro} x accumulation {accumulation} "
            f"x world size {world_size} = {product}",
            key="train.train_batch_size",
            mend=mend,
        )
    )


def _divide(amount: int, divisor: int, name: str, world_size: int) -> int:
    if amount % divisor == 0:
        return amount // divisor
    unit = divisor * world_size if name != "the world size" else world_size
    total = amount * world_size if name != "the world size" else amount
    below, above = total // unit * unit, math.ceil(total / unit) * unit
    choices = f"{below} or {above}" if below else f"{above}"
    what = f"world size {world_size}" + (f" x {name} {divisor} = {unit}" if unit != world_size else "")
    raise RequestError(
        Problem(
            f"train_batch_size {total} does not divide by {what}",
            key="train.train_batch_size",
            mend=f"the nearest that does: {choices}",
        )
    )


def _largest(fits: Callable[[int], bool], per_rank: int | None) -> int:
    """The largest micro-batch up to 16 that fits, and divides `per_rank` where that is given; at least 1."""
    sizes = [size for size in (16, 8, 4, 2) if fits(size)] if per_rank is None else _divisors(per_rank, fits)
    return sizes[0] if sizes else 1


def _divisors(per_rank: int, fits: Callable[[int], bool]) -> list[int]:
    return [size for size in range(min(16, per_rank), 0, -1) if per_rank % size == 0 and fits(size)]
