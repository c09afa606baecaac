"""The rule of `train.early_stopping`: when the evaluation loss has not improved for long enough. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BestLoss:
    """The lowest evaluation loss so far (nats), and after how many updates it was found.

    `not_better` is the number of evaluations in a row, up to the last one, whose loss was not lower than the lowest
    loss before it minus `min_delta`.
    """

    loss: float
    update: int
    not_better: int = 0


def with_evaluation(best: BestLoss | None, update: int, loss: float, min_delta: float) -> BestLoss:
    """The best loss after one more evaluation; `best` is None before the first one.

    A loss that is lower by less than `min_delta` is the best loss from then on, but does not count as better.
    """
    if best is None:
        return BestLoss(loss, update)
    not_better = 0 if loss < best.loss - min_delta else best.not_better + 1
    return BestLoss(loss, update, not_better) if loss < best.loss else BestLoss(best.loss, best.update, not_better)


def early_stop_reason(best: BestLoss, patience: int, min_delta: float) -> str | None:
    """Why the run ends after this evaluation, as text; None if it does not."""
    if best.not_better < patience:
        return None
    by = f" by more than {min_delta:g}" if min_delta else ""
    times = "1 evaluation" if best.not_better == 1 else f"{best.not_better} evaluations in a row"
    lowest = f"the lowest is {best.loss:.4f}, after update {best.update}"
    return f"early stopping: the evaluation loss did not improve{by} in {times}; {lowest}"
