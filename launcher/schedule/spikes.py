"""A detector of loss spikes: pure, deterministic, and identical on all ranks that see the same numbers.

Based on OLMo-core's skip-step rule (allenai/OLMo-core, optim/skip_step_optimizer.py): a value 6 standard deviations
above a window of 128 is an outlier. Three things differ. OLMo-core waits for half a window; this detector starts after
24 updates (8 for the level, 16 for deviations from it), to cover short runs and the end of a warm-up. Deviations are
from the mean of the 8 accepted values before, because a falling loss would otherwise hide a rise. Gradient norms are
compared as logarithms, because their noise is multiplicative.

A spike is three outliers in a row, or a climb of the level itself that is too slow or too small for outliers: with
small batches, noise can hide a loss that rises by a quarter, and no single value is an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any, Literal

LEVEL = 8
"""The level is the mean of this many accepted values; the next value is compared with it."""
SPAN = 16
"""A climb is the mean of this many values minus the lowest such mean before."""
CLIMB_DEVIATIONS = 4.0
"""In standard deviations of one value. At 3.5, autocorrelated noise (0.7) caused 2 false alarms in 24,000 updates; at 4
none. At 4.5, one of the ten runs of benchmarks/spike_guard.py that diverged was not detected."""
MIN_SPREAD = 0.01
"""The smallest standard deviation, as a fraction of the level: avoids alarms when the loss hardly moves."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one update, with a one-sentence reason."""

    kind: Literal["ok", "outlier", "spike"]
    reason: str


@dataclass
class Series:
    """The accepted values of one metric, and their deviations from the level before them."""

    values: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)

    def accept(self, value: float, window: int) -> None:
        if len(self.values) >= LEVEL:
            self.deviations = [*self.deviations, value - self.level()][-window:]
        self.values = [*self.values, value][-window:]

    def level(self) -> float:
        return fmean(self.values[-LEVEL:])

    def score(self, value: float, min_spread: float) -> float:
        """How many standard deviations the value is above the level plus its drift."""
        expected = self.level() + fmean(self.deviations)
        return (value - max(expected, self.level())) / self.spread(min_spread)

    def spread(self, minimum: float) -> float:
        return max(pstdev(self.deviations), minimum)

    def climb(self, min_spread: float) -> float:
        """How many standard deviations the mean of the latest values is above the lowest earlier mean in the window."""
        if len(self.deviations) <= SPAN or len(self.values) < 2 * SPAN:
            return 0.0
        sums = [0.0, *accumulate(self.values)]
        means = [(after - before) / SPAN for before, after in zip(sums, sums[SPAN:], strict=False)]
        return (means[-1] - min(means[:-SPAN])) / max(pstdev(self.deviations[:-SPAN]), min_spread)


class SpikeDetector:
    """Watches the loss and the gradient norm of every update.

    `window`: number of accepted values kept; `minimum`: number of deviations needed before detection starts;
    `deviations`: threshold of an outlier in standard deviations; `sustained`: number of outliers in a row that make a
    spike; `cooldown`: number of updates after a spike during which only NaN or Inf is reported. Raises ValueError for
    invalid numbers.
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
            raise ValueError(f"expected window >= {2 * SPAN}, {LEVEL} <= minimum <= window, and deviations > 0")
        if sustained < 1 or cooldown < 0:
            raise ValueError("expected sustained >= 1 and cooldown >= 0")
        self.window, self.minimum, self.deviations = window, minimum, deviations
        self.sustained, self.cooldown = sustained, cooldown
        self._loss, self._norm = Series(), Series()
        self._in_a_row = 0
        self._cooldown_until = -1

    def watch(self, update: int, loss: float, grad_norm: float | None = None) -> Verdict:
        """The verdict on this update's reduced loss and gradient norm.

        Do not pass updates that fp16 loss scaling skipped: their norm is NaN or Inf without a spike. After a spike the
        detector resets, learns the new level, and reports no outliers during the cooldown.
        """
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return self._spike(update, f"loss {loss:g}, gradient norm {_shown(grad_norm)}: NaN or Inf")
        outlier = self._outlier(loss, grad_norm)
        if outlier is None:
            self._in_a_row = 0
            return self._accept(update, loss, grad_norm)
        if update <= self._cooldown_until:
            return Verdict("ok", f"update {update}: {outlier}; ignored until update {self._cooldown_until + 1}")
        self._in_a_row += 1
        if self._in_a_row >= self.sustained:
            return self._spike(update, f"{outlier}; {self._in_a_row} outliers in a row")
        return Verdict("outlier", f"update {update}: {outlier}")

    def cool_down(self, update: int) -> None:
        """Reset and start a cooldown, as after a spike. For changes of the learning rate."""
        self._loss, self._norm, self._in_a_row = Series(), Series(), 0
        self._cooldown_until = update + self.cooldown

    def _outlier(self, loss: float, grad_norm: float | None) -> str | None:
        if len(self._loss.deviations) >= self.minimum:
            score = self._loss.score(loss, self._min_spread())
            if score > self.deviations:
                return f"loss {loss:.4g} is {score:.1f} deviations above its level {self._loss.level():.4g}"
        if grad_norm and len(self._norm.deviations) >= self.minimum:
            score = self._norm.score(math.log(grad_norm), math.log1p(MIN_SPREAD))
            if score > self.deviations:
                level = math.exp(self._norm.level())
                return f"gradient norm {grad_norm:.4g} is {score:.1f} deviations above its level {level:.4g}"
        return None

    def _accept(self, update: int, loss: float, grad_norm: float | None) -> Verdict:
        self._loss.accept(loss, self.window)
        if grad_norm:
            self._norm.accept(math.log(grad_norm), self.window)
        enough = len(self._loss.deviations) >= self.minimum + SPAN
        climb = self._loss.climb(self._min_spread()) if enough and update > self._cooldown_until else 0.0
        if climb > CLIMB_DEVIATIONS:
            return self._spike(update, f"the last {SPAN} losses are {climb:.1f} deviations above their lowest level")
        return Verdict("ok", f"update {update}: loss {loss:.4g}")

    def _min_spread(self) -> float:
        return max(abs(self._loss.level()) * MIN_SPREAD, 1e-12)

    def _spike(self, update: int, reason: str) -> Verdict:
        self.cool_down(update)
        return Verdict("spike", f"update {update}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """The detector's state as JSON types."""
        return {
            "loss": asdict(self._loss),
            "norm": asdict(self._norm),
            "in_a_row": self._in_a_row,
            "quiet_until": self._cooldown_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self._loss, self._norm = _series(state["loss"]), _series(state["norm"])
        self._in_a_row, self._cooldown_until = state["in_a_row"], state["quiet_until"]


def _series(state: Mapping[str, Sequence[float]]) -> Series:
    return Series(list(state["values"]), list(state["deviations"]))


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
