"""The response to a loss spike: the same on every rank, since all see the same reduced values."""

from __future__ import annotations

import math
from typing import Any

from launcher.errors import FailureCode, RequestError
from launcher.plan.revision import extensions, schedule_of, with_longer_warmup, with_lower_peak
from launcher.plan.schema import Plan
from launcher.records import RankEvent
from launcher.run_dir import RunDir, write_atomic
from launcher.schedule.curve import effective_schedule
from launcher.schedule.spikes import SpikeDetector
from launcher.worker import scheduler
from launcher.worker.control import RecordEvent
from launcher.worker.lr_check import LRCheck
from launcher.worker.ranks import Ranks

_REMEDIES = {"extend_warmup": with_longer_warmup, "lower_peak": with_lower_peak}


class SpikeGuard:
    """Watches loss and gradient norm, and applies `schedule.on_spike`. `plan` is the current revision."""

    def __init__(
        self, run: RunDir, plan: Plan, ranks: Ranks, engine: Any, lr_check: LRCheck, record_event: RecordEvent
    ) -> None:
        self._run, self._ranks, self._engine = run, ranks, engine
        self._lr_check, self._record_event = lr_check, record_event
        self._remedy = plan.job.schedule.on_spike
        self._detector = SpikeDetector()
        self.plan = plan
        self.stop_reason: str | None = None
        self.stop_code: FailureCode | None = None

    def rejects(self, update: int, loss: float, grad_norm: float | None) -> bool:
        """Whether an update must not be made because its loss or gradient is NaN or Inf: the weights are still finite.

        In fp16 DeepSpeed itself skips such updates while it searches for a loss scale.
        """
        finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
        if finite or self._remedy == "warn" or self.plan.precision == "fp16":
            return False
        what, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
        self._event({"event": "spike", "update": update, "reason": f"the {what} is {value}", "remedy": "stop"})
        self.stop_reason = f"the {what} of update {update} is {value}; the weights are those before this update"
        self.stop_code = FailureCode.NAN_LOSS
        return True

    def watch(self, update: int, loss: float, grad_norm: float | None, skipped: bool) -> None:
        """Checks an update that was made; reports a spike and applies the remedy of the job."""
        if skipped and self.plan.precision == "fp16":
            return
        if skipped:
            reason = "DeepSpeed skipped it: its gradient is NaN or Inf"
            self._event({"event": "spike", "update": update, "reason": reason, "remedy": "stop"})
            if self._remedy != "warn":
                self.stop_reason = f"DeepSpeed skipped update {update}, whose gradient is NaN or Inf"
                self.stop_code = FailureCode.NAN_LOSS
            return
        verdict = self._detector.watch(update, loss, grad_norm)
        if verdict.kind == "outlier":
            self._event({"event": "outlier", "update": update, "reason": verdict.reason})
        elif verdict.kind == "spike":
            self._event({"event": "spike", "update": update, "reason": verdict.reason, "remedy": self._remedy})
            if self._remedy == "stop":
                self.stop_reason = f"a spike, and schedule.on_spike is stop. {verdict.reason}"
                self.stop_code = FailureCode.LOSS_SPIKE
            elif self._remedy in _REMEDIES:
                self._apply_remedy(update)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs."""
        return {"detector": self._detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._detector.load_state_dict(state["detector"])

    def _apply_remedy(self, update: int) -> None:
        """Lowers the learning rate from the next update on, in the plan and in the scheduler."""
        most = self.plan.job.schedule.max_extensions
        if extensions(self.plan) >= most:
            reason = f"the warm-up was already extended {most} times"
            self._event({"event": "not_extended", "update": update, "reason": reason})
            return
        at = self._engine.lr_scheduler.last_batch_iteration
        try:
            self.plan = _REMEDIES[self._remedy](self.plan, at)
        except (RequestError, ValueError) as error:
            self._event({"event": "not_extended", "update": update, "reason": str(error)})
            return
        scheduler.follow(self._engine, self.plan, at)
        self._lr_check.follow(self.plan)
        self._detector.cool_down(update)
        if self._ranks.first:
            write_atomic(self._run.next_plan_revision(), self.plan.to_json())
        now = effective_schedule(schedule_of(self.plan), at)
        self._event(
            {
                "event": "warmup_extended",
                "update": at,
                "warmup_updates": now.warmup_updates,
                "peak_lr": now.peak_lr,
                "lr": self._engine.lr_scheduler.get_last_lr()[0],
                "plan_sha256": self.plan.sha256,
            }
        )

    def _event(self, event: RankEvent) -> None:
        if self._ranks.first:
            self._record_event(event)
