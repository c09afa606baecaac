"""Progress in samples: what becomes of a schedule when the batch changes on a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from launcher.errors import Problem, RequestError
from launcher.schedule.curve import Schedule, in_force, rate_at, warmup_at
from launcher.schedule.segments import Segment


def convert_updates(update: int, old_batch: int, new_batch: int) -> int:
    """The update of the new batch size at which as many samples were seen, to the nearest (half goes up)."""
    if update < 0 or old_batch < 1 or new_batch < 1:
        raise RequestError(f"{update} updates of {old_batch} samples cannot become updates of {new_batch}")
    return (2 * update * old_batch + new_batch) // (2 * new_batch)


def rescale(
    schedule: Schedule, *, done_updates: int, old_batch: int, new_batch: int, total_samples: int
) -> tuple[Schedule, int, str]:
    """The schedule for the rest of a run whose batch changed, the update to resume at, and the arithmetic.

    Warm-up, total and decay points are converted by samples. Whole updates cannot hit the old rate exactly,
    so the warm-up within three updates of the exact one is taken that comes nearest to the rate of the next
    update. That leaves a jump of less than 1% of the peak where the warm-up and every decaying part have 100
    new updates or more (cosine_restarts: away from a restart, where the curve itself jumps). With fewer, one
    update is itself a change of more than 1%, and the arithmetic states the jump. Extensions of the warm-up
    and halvings are folded in. Raises RequestError where no samples are left.
    """
    done = done_updates * old_batch
    left = total_samples - done
    if left <= 0 or not 0 <= done_updates < schedule.total_updates:
        message = f"{done} of {total_samples} samples are done: nothing is left to train"
        raise RequestError(Problem(message=message, key="train.train_batch_size"))
    if old_batch == new_batch:
        return schedule, done_updates, f"The batch stays at {old_batch}: resume at update {done_updates}."
    resumed = convert_updates(done_updates, old_batch, new_batch)
    total = resumed + math.ceil(left / new_batch)
    wanted = rate_at(schedule, done_updates)
    best = min(
        _candidates(schedule, done_updates, old_batch / new_batch, total),
        key=lambda candidate: abs(rate_at(candidate, resumed) - wanted),
    )
    return best, resumed, _arithmetic(schedule, best, done_updates, resumed, old_batch, new_batch)


def _candidates(schedule: Schedule, done: int, ratio: float, total: int) -> Iterator[Schedule]:
    """Schedules in new updates, the exact conversion of the warm-up first."""
    warmup = warmup_at(schedule, done)
    exact = round(warmup * ratio)
    segments = _converted(schedule.segments, ratio, total)
    now = in_force(schedule, done)
    for distance, sign in product(range(4), (1, -1)):
        length = exact + sign * distance
        if warmup == 0 and length != 0:
            continue
        if length >= min(1, warmup):
            yield replace(now, warmup_updates=length, total_updates=total, segments=segments)


def _converted(segments: tuple[Segment, ...], ratio: float, total: int) -> tuple[Segment, ...]:
    """The segments in new updates; one that becomes empty is left out, and the last ends with the run."""
    converted: list[Segment] = []
    for segment in segments:
        start = converted[-1].end if converted else min(round(segment.start * ratio), total - 1)
        end = total if segment is segments[-1] else min(round(segment.end * ratio), total)
        if end > start:
            converted.append(replace(segment, start=start, end=end))
    return tuple(converted)


def _arithmetic(old: Schedule, new: Schedule, done: int, resumed: int, old_batch: int, new_batch: int) -> str:
    before, after = rate_at(old, done), rate_at(new, resumed)
    exact = done * old_batch / new_batch
    return (
        f"{done} updates × {old_batch} = {done * old_batch} samples = {exact:.6g} updates × {new_batch}: "
        f"resume at update {resumed} of {new.total_updates}. "
        f"Warm-up {warmup_at(old, done)} × {old_batch}/{new_batch} → {new.warmup_updates} updates. "
        f"The rate goes on at {after:.6g} after {before:.6g}, "
        f"a jump of {(after - before) / old.peak_lr:+.2%} of the peak."
    )
