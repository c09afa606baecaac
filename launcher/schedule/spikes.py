"""A detector of loss spikes: pure, deterministic, and the same on every rank that sees the same numbers.

After OLMo-core's skip-step rule (allenai/OLMo-core, optim/skip_step_optimizer.py): a value 6 standard
deviations above a window of 128 is an outlier. Three things differ. OLMo-core waits for half a window; here
guarding starts after 24 updates (8 to know a level, 16 deviations from it), so that short runs and the end of
a warm-up are guarded. Deviations are taken from the mean of the 8 accepted values before, so that a falling
loss does not hide a rise. Gradient norms are compared as logarithms, since their noise is a factor. A spike is
three outliers in a row, or a climb of the level itself that was too slow or too small for outliers: the noise of small
batches hides a loss that rises by a quarter, and no single value of it is an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any, Literal

LEVEL = 8
"""How many accepted values make the level that the next one is compared with."""
SPAN = 16
"""A climb is the mean of this many values against the lowest such mean before."""
CLIMB_DEVIATIONS = 4.0
"""So many deviations of one value. At 3.5, noise that remembers (autocorrelation 0.7) raised 2 alarms in 24,000
updates; at 4 none. At 4.5, one of the ten runs of benchmarks/spike_guard.py that broke went unseen."""
LEAST_SPREAD = 0.01
"""The least standard deviation, as a share of the level: a loss that hardly moves is no reason for alarm."""


@dataclass(frozen=True)
class Verdict:
    """What one update's numbers mean: `kind`, and one sentence that says why."""

    kind: Literal["ok", "outlier", "spike"]
    reason: str


@dataclass
class Track:
    """One series: the accepted values, their deviations from the level before them, and the latest values."""

    values: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)

    def accept(self, value: float, window: int) -> None:
        if len(self.values) >= LEVEL:
            self.deviations = [*self.deviations, value - self.level()][-window:]
        self.values = [*self.values, value][-window:]

    def level(self) -> float:
        return fmean(self.values[-LEVEL:])

    def score(self, value: float, least_spread: float) -> float:
        """How many standard deviations the value lies above what the level and its drift let expect."""
        expected = self.level() + fmean(self.deviations)
        return (value - max(expected, self.level())) / self.spread(least_spread)

    def spread(self, least: float) -> float:
        return max(pstdev(self.deviations), least)

    def climb(self, least_spread: float) -> float:
        """How many deviations the latest values lie, on average, above the lowest average remembered."""
        if len(self.deviations) <= SPAN or len(self.values) < 2 * SPAN:
            return 0.0
        sums = [0.0, *accumulate(self.values)]
        means = [(after - before) / SPAN for before, after in zip(sums, sums[SPAN:], strict=False)]
        return (means[-1] - min(means[:-SPAN])) / max(pstdev(self.deviations[:-SPAN]), least_spread)


class SpikeDetector:
    """Watches the loss and the gradient norm of every update.

    `window`: how many accepted values are remembered; `minimum`: how many deviations are needed before
    judging; `deviations`: what makes an outlier; `sustained`: how many outliers in a row make a spike;
    `cooldown`: for how many updates after a spike nothing but a loss that is not finite is told. Raises
    ValueError for numbers that cannot work.
    """

    def __init__(
        self,
        *,
        window: int = 128,
        minimum: int = 16,
        deviations: float = 6.0,
        sustained: int = 3,
        cooldown: int = 32,
    ) -> None:
        if window < 2 * SPAN or not LEVEL <= minimum <= window or deviations <= 0:
            raise ValueError(f"a window of {2 * SPAN} or more, a minimum from {LEVEL} up to it, and deviations above 0")
        if sustained < 1 or cooldown < 0:
            raise ValueError("1 or more outliers in a row, and a cooldown of 0 or more updates")
        self.window, self.minimum, self.deviations = window, minimum, deviations
        self.sustained, self.cooldown = sustained, cooldown
        self._loss, self._norm = Track(), Track()
        self._in_a_row = 0
        self._quiet_until = -1

    def watch(self, update: int, loss: float, grad_norm: float | None = None) -> Verdict:
        """What this update's reduced loss and gradient norm say.

        Leave out updates that fp16 loss scaling skipped: their norm is not finite, and that is no spike.
        After a spike the detector forgets what it saw, learns the new level, and keeps still for a while.
        """
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return self._spike(update, f"loss {loss:g}, gradient norm {_shown(grad_norm)}: not finite")
        odd = self._odd(loss, grad_norm)
        if odd is None:
            self._in_a_row = 0
            return self._accept(update, loss, grad_norm)
        if update <= self._quiet_until:
            return Verdict("ok", f"update {update}: {odd}; not judged until update {self._quiet_until + 1}")
        self._in_a_row += 1
        if self._in_a_row >= self.sustained:
            return self._spike(update, f"{odd}; {self._in_a_row} such updates in a row")
        return Verdict("outlier", f"update {update}: {odd}")

    def cool_down(self, update: int) -> None:
        """Forget what was seen and keep still for the cooldown, as after a spike: the rate has changed."""
        self._loss, self._norm, self._in_a_row = Track(), Track(), 0
        self._quiet_until = update + self.cooldown

    def _odd(self, loss: float, grad_norm: float | None) -> str | None:
        if len(self._loss.deviations) >= self.minimum:
            score = self._loss.score(loss, self._least_spread())
            if score > self.deviations:
                return f"loss {loss:.4g} is {score:.1f} deviations above its level {self._loss.level():.4g}"
        if grad_norm and len(self._norm.deviations) >= self.minimum:
            score = self._norm.score(math.log(grad_norm), math.log1p(LEAST_SPREAD))
            if score > self.deviations:
                level = math.exp(self._norm.level())
                return f"gradient norm {grad_norm:.4g} is {score:.1f} deviations above its level {level:.4g}"
        return None

    def _accept(self, update: int, loss: float, grad_norm: float | None) -> Verdict:
        self._loss.accept(loss, self.window)
        if grad_norm:
            self._norm.accept(math.log(grad_norm), self.window)
        enough = len(self._loss.deviations) >= self.minimum + SPAN
        climb = self._loss.climb(self._least_spread()) if enough and update > self._quiet_until else 0.0
        if climb > CLIMB_DEVIATIONS:
            return self._spike(update, f"the last {SPAN} losses lie {climb:.1f} deviations above their lowest level")
        return Verdict("ok", f"update {update}: loss {loss:.4g}")

    def _least_spread(self) -> float:
        return max(abs(self._loss.level()) * LEAST_SPREAD, 1e-12)

    def _spike(self, update: int, reason: str) -> Verdict:
        self.cool_down(update)
        return Verdict("spike", f"update {update}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """All that the detector remembers, as JSON types."""
        return {
            "loss": asdict(self._loss),
            "norm": asdict(self._norm),
            "in_a_row": self._in_a_row,
            "quiet_until": self._quiet_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._loss, self._norm = _track(state["loss"]), _track(state["norm"])
        self._in_a_row, self._quiet_until = state["in_a_row"], state["quiet_until"]


def _track(state: Mapping[str, Sequence[float]]) -> Track:
    return Track(list(state["values"]), list(state["deviations"]))


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
