"""Early stopping: the same decision on every rank, since all see the same evaluation losses."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.plan.schema import Plan
from launcher.schedule.early_stopping import BestLoss, early_stop_reason, with_evaluation
from launcher.worker.control import RecordEvent
from launcher.worker.ranks import Ranks


class EarlyStopping:
    """Follows the evaluation losses, and applies `train.early_stopping`.

    Its state is part of every checkpoint, so that a resume counts the evaluations before that checkpoint and no others.
    It also follows the losses of a job without early stopping, which a resume may switch on.
    """

    def __init__(self, plan: Plan, ranks: Ranks, record_event: RecordEvent) -> None:
        self._section, self._ranks, self._record_event = plan.job.train.early_stopping, ranks, record_event
        self._best: BestLoss | None = None
        self.stop_reason: str | None = None

    def evaluated(self, update: int, loss: float) -> None:
        """Counts the evaluation after `update` updates; all ranks must call it.

        Raises RunFailed if early stopping cannot compare the loss: it is NaN or Inf.
        """
        # The first rank's loss, exactly: another rank's may differ in the last bit, depending on the backend's order.
        (loss,) = self._ranks.sum([loss if self._ranks.first else 0.0])
        if not math.isfinite(loss):
            if self._section is None:
                return
            message = (
                f"the evaluation loss after update {update} is {loss}: train.early_stopping cannot compare it\n"
                "  Hint: look at the losses before it with launcher status; a lower schedule.peak_lr may help"
            )
            raise RunFailed(message, code=FailureCode.NAN_LOSS)
        self._best = with_evaluation(self._best, update, loss, self._section.min_delta if self._section else 0.0)

    def decide(self, update: int) -> str | None:
        """Why the run ends after `update` updates, which were evaluated; None if it does not. Records the event."""
        if self._section is None or self._best is None:
            return None
        self.stop_reason = early_stop_reason(self._best, self._section.patience, self._section.min_delta)
        if self.stop_reason and self._ranks.first:
            self._record_event(
                {
                    "event": "early_stop",
                    "update": update,
                    "reason": self.stop_reason,
                    "best_update": self._best.update,
                    "best_loss": self._best.loss,
                }
            )
        return self.stop_reason

    def state_dict(self) -> dict[str, Any] | None:
        """The state that a resume needs; None before the first evaluation."""
        return asdict(self._best) if self._best else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores the state. Checkpoints of earlier versions have none: counting starts with the next evaluation."""
        self._best = BestLoss(**state) if state else None
