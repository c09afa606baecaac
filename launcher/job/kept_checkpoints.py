"""Which checkpoints of a run are kept. The same rule applies in the run directory and in cloud storage."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.job.schema import CheckpointSection


def removable(losses: Mapping[int, float | None], section: CheckpointSection) -> list[int]:
    """The updates whose checkpoints no rule keeps. `losses` has the evaluation loss of each update, oldest first."""
    newest_first: list[int] = list(losses)[::-1]
    kept = set(newest_first[: section.keep])
    if section.keep_every is not None:
        kept |= {update for update in losses if update % section.keep_every == 0}
    if section.keep_best is not None:
        kept |= set(best_first(losses)[: section.keep_best])
    return [update for update in losses if update not in kept]


def best_first(losses: Mapping[int, float | None]) -> list[int]:
    """The updates with a known evaluation loss, the lowest loss first. `losses` are in order, oldest first."""
    # Of equal losses, the newest is the best: sorting is stable.
    known = [(loss, update) for update in list(losses)[::-1] if (loss := losses[update]) is not None]
    return [update for _, update in sorted(known, key=lambda each: each[0])]
