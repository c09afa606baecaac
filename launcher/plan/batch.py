"""Batch sizes: train_batch_size = micro-batch x accumulation x world size; derives those that are not given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import Problem, RequestError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
TARGET_BATCH = 32
"""Default sequences per update: few enough for small data sets, enough for a stable gradient."""


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes: the first is the product of the others and the world size."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int


def resolve_batch(
    given: Mapping[str, int],
    world_size: int,
    fits: Callable[[int], bool],
    sequences: int | None = None,
    target: int = TARGET_BATCH,
) -> BatchSizes:
    """The three sizes, from those that are `given`. A batch that is not given is near `target`.

    It is at most `sequences`, if possible.

    `fits(micro)` returns whether a micro-batch fits in memory. A micro-batch that is not given is the largest that fits
    and divides the batch (at most 16, and within `target` if the batch is not given either), or 1 if none fits.
    Raises RequestError if the sizes do not multiply out.
    """
    batch, micro, accumulation = (given.get(key) for key in KEYS)
    if batch is None:
        most = target if sequences is None else min(target, sequences)
        micro = micro or _within(most, world_size * (accumulation or 1), fits)
        accumulation = accumulation or _default_accumulation(micro * world_size, sequences, target)
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
    hint = f"set it to {product}"
    if not rest:
        hint += f", or remove gradient_accumulation_steps: it is then {derived}"
    raise RequestError(
        Problem(
            f"train_batch_size {batch} is not micro-batch {micro} x accumulation {accumulation} "
            f"x world size {world_size} = {product}",
            key="train.train_batch_size",
            hint=hint,
        )
    )


def _divide(batch: int, world_size: int, name: str = "", factor: int = 1) -> int:
    """`batch` divided by the world size and by `factor`, the value of `name`. Raises RequestError for a remainder."""
    unit = world_size * factor
    if batch % unit == 0:
        return batch // unit
    below = batch // unit * unit
    choices = f"{below} or {below + unit}" if below else f"{unit}"
    what = f"world size {world_size}" + (f" x {name} {factor} = {unit}" if name else "")
    raise RequestError(
        Problem(
            f"train_batch_size {batch} is not divisible by {what}",
            key="train.train_batch_size",
            hint=f"the nearest valid size: {choices}",
        )
    )


def _within(most: int, sequences_per_micro: int, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch of 16, 8, 4 and 2 that fits and keeps the batch within `most`, or 1."""
    sizes = (size for size in (16, 8, 4, 2) if size * sequences_per_micro <= most and fits(size))
    return next(sizes, 1)


def _default_accumulation(unit: int, sequences: int | None, target: int) -> int:
    """Micro-batches of `unit` sequences per update, for a batch near `target` and within `sequences`."""
    near = round(target / unit)
    return max(1, near if sequences is None else min(near, sequences // unit))


def _largest(fits: Callable[[int], bool], per_rank: int) -> int:
    """The largest micro-batch up to 16 that fits and divides `per_rank`; at least 1."""
    sizes = (size for size in range(min(16, per_rank), 0, -1) if per_rank % size == 0 and fits(size))
    return next(sizes, 1)
