"""Advice on peak learning rate, warm-up and shape from published recipes, each with a reason.

The peak is base(method) · (P/P0)^-0.3 · √(B/B0), with P in parameters and B in tokens per update. The size exponent is
the one within published model families. The batch factor is clipped to ½ to 4 and applies only if all weights of a
language model are trained: √B is from Malladi et al. (arXiv 2205.10287); recipes for LoRA and encoders do not show it.
Only the bases are fitted: robustly, regularised towards the usual constants, on recipes.csv.
benchmarks/advice_accuracy.py fits and scores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.schedule.curve import DEFAULT_FLOORS, Schedule, make_schedule
from launcher.schedule.safety import peak_limit


@dataclass(frozen=True)
class Situation:
    """What the run trains. `tokens_per_update` and `dataset_samples` are None if unknown.

    method: "full", "lora", "preference", "preference-lora" or "encoder"; task: "similar" to the pre-training data,
    "divergent" from it, or None.
    """

    parameters: int
    method: str
    tokens_per_update: float | None
    total_updates: int
    dataset_samples: int | None = None
    beta2: float = 0.999
    task: str | None = None


@dataclass(frozen=True)
class Choice:
    """One value, its reasonable range, and why. `heuristic`: there is no published evidence."""

    value: Any
    low: Any
    high: Any
    reason: str
    sources: tuple[str, ...]
    heuristic: bool


@dataclass(frozen=True)
class Advice:
    """Peak learning rate, warm-up in updates, shape, and floor as a fraction of the peak."""

    peak_lr: Choice
    warmup_updates: Choice
    shape: Choice
    floor: Choice


@dataclass(frozen=True)
class Family:
    """A method's learning rate at a reference size (parameters) and batch (tokens per update; None: not scaled)."""

    base_lr: float
    parameters: float = 7e9
    tokens_per_update: float | None = None


FAMILIES: Mapping[str, Family] = {
    "full": Family(2.2e-5, tokens_per_update=2.6e5),
    "lora": Family(2.0e-4),
    "preference": Family(5.1e-7, tokens_per_update=2.6e5),
    "preference-lora": Family(5.5e-6),
    "encoder": Family(1.2e-5, parameters=3.5e8),
}
SIZE_EXPONENT = 0.3
BATCH_FACTORS = (0.5, 4.0)
LARGE, VERY_LARGE = 6e9, 30e9
MANY_SAMPLES = 100_000
MAX_WARMUP = 0.2
MAX_LINEAR_FLOOR = 0.1

RECIPES = "recipes.csv: published recipes, each with its source"
ADAM_WARMUP = "Ma & Yarats, arXiv 1910.04209"


def advise(situation: Situation, *, shape: str | None = None, warmup_updates: int | None = None) -> Advice:
    """Advice for a run. `shape` and `warmup_updates`, if given, are fixed; the rest of the advice fits them.

    Raises RequestError for an invalid situation.
    """
    _check(situation)
    warmup = _warmup(situation)
    length = warmup.value if warmup_updates is None else warmup_updates
    advised_shape = _shape(situation, length)
    return Advice(_peak(situation), warmup, advised_shape, _floor(shape or advised_shape.value, length))


def advised_schedule(situation: Situation, advice: Advice | None = None) -> Schedule:
    """The advised schedule."""
    advice = advice or advise(situation)
    floor = None if advice.shape.value == "linear" else advice.floor.value
    return make_schedule(
        advice.shape.value,
        peak_lr=advice.peak_lr.value,
        warmup_updates=advice.warmup_updates.value,
        total_updates=situation.total_updates,
        floor=floor,
    )


def _check(situation: Situation) -> None:
    if situation.method not in FAMILIES:
        close = nearest(situation.method, FAMILIES)
        hint = f"did you mean {close}?" if close else ", ".join(FAMILIES)
        raise RequestError(Problem(f"unknown method {situation.method!r}", hint=hint))
    if situation.task not in (None, "similar", "divergent"):
        message = f"unknown task {situation.task!r}"
        raise RequestError(Problem(message, key="schedule.task", hint="similar or divergent"))
    if situation.parameters < 1 or situation.total_updates < 1 or not 0 <= situation.beta2 < 1:
        raise RequestError("advice needs 1 or more parameters, 1 or more updates, and 0 <= beta2 < 1")


def advised_peak_lr(
    method: str, parameters: float, tokens_per_update: float | None, families: Mapping[str, Family] = FAMILIES
) -> float:
    """The advised peak learning rate, to two significant digits, never above the limit of `check_safety`.

    Never rises with model size.
    """
    lr = family_lr(families[method], parameters, tokens_per_update)
    limit = peak_limit(method, parameters)
    return float(f"{min(lr, limit.peak_lr) if limit else lr:.1e}")


def family_lr(family: Family, parameters: float, tokens_per_update: float | None) -> float:
    """The family's base learning rate scaled to this size and batch, not rounded or limited."""
    size: float = (parameters / family.parameters) ** -SIZE_EXPONENT
    return family.base_lr * size * _batch_factor(family, tokens_per_update)


def _batch_factor(family: Family, tokens_per_update: float | None) -> float:
    if not tokens_per_update or not family.tokens_per_update:
        return 1.0
    low, high = BATCH_FACTORS
    return min(high, max(low, math.sqrt(tokens_per_update / family.tokens_per_update)))


def _peak(situation: Situation) -> Choice:
    value = advised_peak_lr(situation.method, situation.parameters, situation.tokens_per_update)
    family = FAMILIES[situation.method]
    batch = "the batch in tokens is unknown, so there is no batch scaling"
    if family.tokens_per_update is None:
        batch = "there is no published batch scaling for this method"
    elif situation.tokens_per_update:
        factor = _batch_factor(family, situation.tokens_per_update)
        batch = f"the batch of {situation.tokens_per_update:.3g} tokens per update scales it by {factor:.2g}"
    reason = (
        f"Published {situation.method} recipes centre on {family.base_lr:g} at {_billions(family.parameters)}"
        f"; learning rates fall with size to the power {SIZE_EXPONENT:g}, and {batch}."
    )
    limit = peak_limit(situation.method, situation.parameters)
    high = min(2 * value, limit.peak_lr) if limit else 2 * value
    sources = (RECIPES, *(["batch: Malladi et al., arXiv 2205.10287"] if family.tokens_per_update else []))
    return Choice(value, value / 2, max(value, high), reason, sources, heuristic=False)


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B parameters"


def _warmup(situation: Situation) -> Choice:
    total = situation.total_updates
    longest = max(int(MAX_WARMUP * total), min(1, total - 1))
    fraction = _warmup_fraction(situation)
    by_fraction, by_adam = _updates(fraction * total), _updates(2 / (1 - situation.beta2))
    value = min(longest, max(by_fraction, by_adam))
    capped, caution = value == longest, fraction > 0.03 and value == by_fraction
    if capped:
        reason = f"{value} of {total} updates ({MAX_WARMUP:.0%}) is the longest warm-up that the launcher chooses"
    elif by_adam >= by_fraction:
        reason = f"2/(1 - beta2) updates, for Adam's second moment at beta2 {situation.beta2:g} to converge"
    else:
        reason = f"{fraction:.0%} of {total} updates"
    if caution and not capped:
        reason += "; longer for a large model, as a caution without published evidence"
    low, high = min(value, _updates(0.03 * total)), max(longest, value)
    sources = (ADAM_WARMUP, "3% of the updates: Alpaca, Vicuna, Tulu")
    return Choice(value, low, high, f"{reason}.", sources, heuristic=capped or caution)


def _warmup_fraction(situation: Situation) -> float:
    if situation.parameters >= VERY_LARGE:
        return 0.10
    return 0.06 if situation.parameters >= LARGE else 0.03


def _updates(number: float) -> int:
    # Round first: 0.07 * 100 is 7.000000000000001 in floats.
    return math.ceil(round(number, 9))


def _shape(situation: Situation, warmup: int) -> Choice:
    samples = situation.dataset_samples
    large = samples is not None and samples >= MANY_SAMPLES
    if 1 / (warmup + 1) > MAX_LINEAR_FLOOR:
        reason = (
            f"With {warmup} updates of warm-up a linear schedule can only fall to 1/{warmup + 1} of the peak, "
            "because WarmupDecayLR ends at its starting value; cosine has a separate floor."
        )
        return Choice("cosine", None, None, reason, ("deepspeed/runtime/lr_schedules.py",), heuristic=False)
    if situation.task == "divergent" or (large and situation.task is None):
        cause = "The task is far from pre-training" if situation.task else f"{samples} samples are a large data set"
        reason = f"{cause}: cosine keeps the learning rate high for longer; a compound schedule is the alternative."
        return Choice("cosine", None, None, reason, (), heuristic=True)
    causes = {"similar": "The task is close to pre-training"}
    cause = causes.get(situation.task or "", "The data set is small" if samples else "The default")
    reason = f"{cause}: linear decay is the simplest choice; try cosine if it converges slowly."
    sources = (
        "linear decay in pre-training: arXiv 2502.15938",
        "small data: Mosbach et al., arXiv 2006.04884",
    )
    return Choice("linear", None, None, reason, sources, heuristic=True)


def _floor(shape: str, warmup: int) -> Choice:
    if shape in ("constant", "step", "compound"):
        reason = f"A {shape} schedule has no floor setting: its end follows from its other settings."
        return Choice(1.0 if shape == "constant" else None, None, None, reason, (), heuristic=False)
    if shape == "linear":
        reason = "WarmupDecayLR has one minimum for both ends: it ends at the first update's learning rate, peak/(W+1)."
        floor = 1 / (warmup + 1)
        return Choice(floor, floor, 1.0, reason, ("deepspeed/runtime/lr_schedules.py",), heuristic=False)
    value = DEFAULT_FLOORS[shape]
    reason = "A tenth of the peak is usual for cosine, so the last updates still train."
    if value == 0:
        reason = f"The decay of {shape} goes to zero, which it would reach one update after the last."
    return Choice(value, 0.0, 0.1, reason, ("decay to zero: arXiv 2502.15938",), heuristic=True)


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_TOKENS = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([kmb]?)\s*tokens?", re.IGNORECASE)
_WARMUP_HINT = 'updates (100), a fraction of the run (0.03 or "5%"), or tokens ("2M tokens")'


def parse_warmup(value: int | float | str, total_updates: int, tokens_per_update: float | None) -> int:
    """Warm-up in updates, from updates (100), a fraction (0.03, "5%") or tokens ("2M tokens"), rounded up.

    Raises RequestError for anything else, and for tokens if the tokens per update are unknown.
    """
    if isinstance(value, str):
        return _parse_text(value.strip(), total_updates, tokens_per_update)
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise _invalid_warmup(value)
    if isinstance(value, int):
        return value
    if value < 1:
        return _updates(value * total_updates)
    if value == 1 or not value.is_integer():
        raise _invalid_warmup(value)
    return int(value)


def _parse_text(text: str, total_updates: int, tokens_per_update: float | None) -> int:
    if match := _TOKENS.fullmatch(text):
        if not tokens_per_update:
            message = f"a warm-up of {text} needs the tokens per update, which are unknown here"
            raise RequestError(Problem(message, key="schedule.warmup", hint="write it in updates or as a fraction"))
        updates = _number(match[1], text) * _UNITS[match[2].lower()] / tokens_per_update
        if not math.isfinite(updates):
            raise _invalid_warmup(text)
        return _updates(updates)
    if text.endswith("%"):
        fraction = _number(text[:-1], text) / 100
        if not 0 <= fraction <= 1:
            raise _invalid_warmup(text)
        return _updates(fraction * total_updates)
    number = _number(text, text)
    if not math.isfinite(number):
        raise _invalid_warmup(text)
    return parse_warmup(int(text) if text.isdigit() else number, total_updates, tokens_per_update)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise _invalid_warmup(text) from None


def _invalid_warmup(value: object) -> RequestError:
    return RequestError(Problem(f"{value!r} is not a warm-up", key="schedule.warmup", hint=_WARMUP_HINT))
