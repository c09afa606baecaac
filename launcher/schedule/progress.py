"""Converts a schedule by samples when the batch size changes at a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from launcher.errors import Problem, RequestError
from launcher.schedule.curve import Schedule, effective_schedule, lr_at, warmup_at
from launcher.schedule.segments import Segment


def convert_updates(update: int, old_batch: int, new_batch: int) -> int:
    """The update with the new batch size after the same number of samples, rounded (half up)."""
    if update < 0 or old_batch < 1 or new_batch < 1:
        raise RequestError(f"cannot convert {update} updates of {old_batch} samples to updates of {new_batch} samples")
    return (2 * update * old_batch + new_batch) // (2 * new_batch)


def rescale(
    schedule: Schedule, *, done_updates: int, old_batch: int, new_batch: int, total_samples: int
) -> tuple[Schedule, int, str]:
    """The schedule for the rest of a run whose batch size changed, the update to resume at, and the arithmetic.

    Warm-up, total and decay points are converted by samples. Whole updates cannot match the old learning rate exactly:
    of the warm-ups within three updates of the exact one, the function chooses the one whose learning rate is closest
    to the old one at the next update. The jump is below 1% of the peak if the warm-up and every decaying part have 100
    or more new updates (cosine_restarts: except at a restart, where the curve itself jumps). With fewer, a single
    update changes the learning rate by more than 1%. The arithmetic states the jump. Extensions of the warm-up and
    halvings are folded in. Raises RequestError if no samples are left.
    """
    done = done_updates * old_batch
    left = total_samples - done
    if left <= 0 or not 0 <= done_updates < schedule.total_updates:
        message = f"{done} of {total_samples} samples are done: no samples are left to train"
        raise RequestError(Problem(message=message, key="train.train_batch_size"))
    if old_batch == new_batch:
        return schedule, done_updates, f"The batch size stays {old_batch}: resume at update {done_updates}."
    resumed = convert_updates(done_updates, old_batch, new_batch)
    total = resumed + math.ceil(left / new_batch)
    old_lr = lr_at(schedule, done_updates)
    best = min(
        _candidates(schedule, done_updates, old_batch / new_batch, total),
        key=lambda candidate: abs(lr_at(candidate, resumed) - old_lr),
    )
    return best, resumed, _arithmetic(schedule, best, done_updates, resumed, old_batch, new_batch)


def _candidates(schedule: Schedule, done: int, ratio: float, total: int) -> Iterator[Schedule]:
    """Schedules in new updates; the first has the exactly converted warm-up."""
    warmup = warmup_at(schedule, done)
    exact = round(warmup * ratio)
    segments = _converted(schedule.segments, ratio, total)
    current = effective_schedule(schedule, done)
    for distance, sign in product(range(4), (1, -1)):
        length = exact + sign * distance
        if warmup == 0 and length != 0:
            continue
        if length >= min(1, warmup):
            yield replace(current, warmup_updates=length, total_updates=total, segments=segments)


def _converted(segments: tuple[Segment, ...], ratio: float, total: int) -> tuple[Segment, ...]:
    """The segments in new updates; empty ones are dropped, and the last ends with the run."""
    converted: list[Segment] = []
    for segment in segments:
        start = converted[-1].end if converted else min(round(segment.start * ratio), total - 1)
        end = total if segment is segments[-1] else min(round(segment.end * ratio), total)
        if end > start:
            converted.append(replace(segment, start=start, end=end))
    return tuple(converted)


def _arithmetic(old: Schedule, new: Schedule, done: int, resumed: int, old_batch: int, new_batch: int) -> str:
    before, after = lr_at(old, done), lr_at(new, resumed)
    exact = done * old_batch / new_batch
    return (
        f"{done} updates × {old_batch} = {done * old_batch} samples = {exact:.6g} updates × {new_batch}: "
        f"resume at update {resumed} of {new.total_updates}. "
        f"Warm-up {warmup_at(old, done)} × {old_batch}/{new_batch} → {new.warmup_updates} updates. "
        f"The learning rate continues at {after:.6g} after {before:.6g}, "
        f"a jump of {(after - before) / old.peak_lr:+.2%} of the peak."
    )
