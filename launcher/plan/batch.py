"""Batch arithmetic: train_batch_size = micro-batch x accumulation x world size, the missing ones derived."""

from __future__ import annotations

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


def resolve_batch(
    given: Mapping[str, int], world_size: int, fits: Callable[[int], bool], sequences: int | None = None
) -> BatchSizes:
    """The three sizes from those of them that are `given`. An open batch is at most `sequences`, if ranks allow it.

    `fits(micro)` says whether a micro-batch fits the memory; where the micro-batch is free, the largest that fits and
    divides is taken (at most 16, and within TARGET_BATCH where the batch is free too), and 1 where none fits.
    Raises RequestError where the sizes cannot multiply out.
    """
    batch, micro, accumulation = (given.get(key) for key in KEYS)
    if batch is None:
        most = TARGET_BATCH if sequences is None else min(TARGET_BATCH, sequences)
        micro = micro or _within(most, world_size * (accumulation or 1), fits)
        accumulation = accumulation or _open_accumulation(micro * world_size, sequences)
        return BatchSizes(micro * accumulation * world_size, micro, accumulation)
    if micro is not None and accumulation is not None:
        return _all_three(batch, micro, accumulation, world_size)
    if accumulation is not None:
        return BatchSizes(batch, _divide(batch, world_size, KEYS[2], accumulation), accumulation)
    if micro is not None:
        return BatchSizes(batch, micro, _divide(batch, world_size, KEYS[1], micro))
    per_rank = _divide(batch, world_size)
    micro = _largest(fits, per_rank)
    return BatchSizes(batch, micro, per_rank // micro)


def _all_three(batch: int, micro: int, accumulation: int, world_size: int) -> BatchSizes:
    product = micro * accumulation * world_size
    if batch == product:
        return BatchSizes(batch, micro, accumulation)
    derived, rest = divmod(batch, micro * world_size)
    hint = f"make it {product}"
    if not rest:
        hint += f", or leave gradient_accumulation_steps out: it comes to {derived}"
    raise RequestError(
        Problem(
            f"train_batch_size {batch} is not micro-batch {micro} x accumulation {accumulation} "
            f"x world size {world_size} = {product}",
            key="train.train_batch_size",
            hint=hint,
        )
    )


def _divide(batch: int, world_size: int, name: str = "", factor: int = 1) -> int:
    """`batch` by the world size and the `factor` called `name`."""
    unit = world_size * factor
    if batch % unit == 0:
        return batch // unit
    below = batch // unit * unit
    choices = f"{below} or {below + unit}" if below else f"{unit}"
    what = f"world size {world_size}" + (f" x {name} {factor} = {unit}" if name else "")
    raise RequestError(
        Problem(
            f"train_batch_size {batch} does not divide by {what}",
            key="train.train_batch_size",
            hint=f"the nearest that does: {choices}",
        )
    )


def _within(most: int, sequences_per_micro: int, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch of 16, 8, 4 and 2 that fits and keeps the batch within `most`; else 1."""
    sizes = (size for size in (16, 8, 4, 2) if size * sequences_per_micro <= most and fits(size))
    return next(sizes, 1)


def _open_accumulation(unit: int, sequences: int | None) -> int:
    """Micro-batches per update of `unit` sequences each: near TARGET_BATCH, and within `sequences`."""
    near = round(TARGET_BATCH / unit)
    return max(1, near if sequences is None else min(near, sequences // unit))


def _largest(fits: Callable[[int], bool], per_rank: int) -> int:
    """The largest micro-batch up to 16 that fits and divides `per_rank`; at least 1."""
    sizes = (size for size in range(min(16, per_rank), 0, -1) if per_rank % size == 0 and fits(size))
    return next(sizes, 1)
