"""What rate, warm-up and shape to take, from what is published, each with its reason.

The peak is base(method) · (P/P0)^-0.3 · √(B/B0), P in parameters and B in tokens an update. The exponent on
size is what holds within published families. The batch factor is kept within ½ and 4 and applies where all
weights of a language model are tuned: √B is Malladi et al. (arXiv 2205.10287), and for LoRA and encoders the
recipes show no such law. Only the bases are fitted, robustly and drawn towards the usual constants, on
recipes.csv; benchmarks/advice_accuracy.py fits and scores them.
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
    """What is to be trained. `tokens_per_update` and `dataset_samples` are None where unknown.

    method: "full", "lora", "preference", "preference-lora" or "encoder"; task: "similar" to what the model
    was pre-trained on, "divergent" from it, or None.
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
    """One number or name, the range that is reasonable, and why; `heuristic` where evidence is lacking."""

    value: Any
    low: Any
    high: Any
    reason: str
    sources: tuple[str, ...]
    heuristic: bool


@dataclass(frozen=True)
class Advice:
    """Peak rate, warm-up in updates, shape, and floor as a share of the peak."""

    peak_lr: Choice
    warmup_updates: Choice
    shape: Choice
    floor: Choice


@dataclass(frozen=True)
class Family:
    """A method's rate at a reference size (parameters) and batch (tokens an update; None: not scaled)."""

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
MUCH_DATA = 100_000
MOST_WARMUP = 0.2
HIGHEST_LINEAR_FLOOR = 0.1

RECIPES = "recipes.csv: published recipes, each with its source"
ADAM_WARMUP = "Ma & Yarats, arXiv 1910.04209"


def advise(situation: Situation, *, shape: str | None = None, warmup_updates: int | None = None) -> Advice:
    """The numbers to start from; raises RequestError for a situation that makes no sense.

    What is advised follows a shape or a warm-up that is already decided.
    """
    _check(situation)
    warmup = _warmup(situation)
    length = warmup.value if warmup_updates is None else warmup_updates
    advised = _shape(situation, length)
    return Advice(_peak(situation), warmup, advised, _floor(shape or advised.value, length))


def advised_schedule(situation: Situation, advice: Advice | None = None) -> Schedule:
    """The schedule that the advice describes."""
    told = advice or advise(situation)
    floor = None if told.shape.value == "linear" else told.floor.value
    return make_schedule(
        told.shape.value,
        peak_lr=told.peak_lr.value,
        warmup_updates=told.warmup_updates.value,
        total_updates=situation.total_updates,
        floor=floor,
    )


def _check(situation: Situation) -> None:
    if situation.method not in FAMILIES:
        close = nearest(situation.method, FAMILIES)
        hint = f"did you mean {close}?" if close else ", ".join(FAMILIES)
        raise RequestError(Problem(f"no advice for the method {situation.method!r}", hint=hint))
    if situation.task not in (None, "similar", "divergent"):
        message = f"no task {situation.task!r}"
        raise RequestError(Problem(message, key="schedule.task", hint="similar or divergent"))
    if situation.parameters < 1 or situation.total_updates < 1 or not 0 <= situation.beta2 < 1:
        raise RequestError("advice needs parameters and updates of 1 or more, and beta2 from 0 to below 1")


def peak_rate(
    method: str, parameters: float, tokens_per_update: float | None, families: Mapping[str, Family] = FAMILIES
) -> float:
    """The advised peak rate, to two significant digits, never above what `check_safety` lets pass.

    Falls, or stays, as the model grows.
    """
    rate = family_rate(families[method], parameters, tokens_per_update)
    limit = peak_limit(method, parameters)
    return float(f"{min(rate, limit.peak_lr) if limit else rate:.1e}")


def family_rate(family: Family, parameters: float, tokens_per_update: float | None) -> float:
    """The family's base rate scaled to this size and batch, unrounded and without a limit."""
    size: float = (parameters / family.parameters) ** -SIZE_EXPONENT
    return family.base_lr * size * _batch_factor(family, tokens_per_update)


def _batch_factor(family: Family, tokens_per_update: float | None) -> float:
    if not tokens_per_update or not family.tokens_per_update:
        return 1.0
    low, high = BATCH_FACTORS
    return min(high, max(low, math.sqrt(tokens_per_update / family.tokens_per_update)))


def _peak(situation: Situation) -> Choice:
    value = peak_rate(situation.method, situation.parameters, situation.tokens_per_update)
    family = FAMILIES[situation.method]
    batch = "the batch in tokens is unknown, so it is not scaled for that"
    if family.tokens_per_update is None:
        batch = "no batch law is published for this method"
    elif situation.tokens_per_update:
        factor = _batch_factor(family, situation.tokens_per_update)
        batch = f"times {factor:.2g} for {situation.tokens_per_update:.3g} tokens an update"
    reason = (
        f"Published {situation.method} recipes centre on {family.base_lr:g} at {_billions(family.parameters)}"
        f"; rates fall with size, to the power {SIZE_EXPONENT:g}, and {batch}."
    )
    limit = peak_limit(situation.method, situation.parameters)
    high = min(2 * value, limit.peak_lr) if limit else 2 * value
    sources = (RECIPES, *(["batch: Malladi et al., arXiv 2205.10287"] if family.tokens_per_update else []))
    return Choice(value, value / 2, max(value, high), reason, sources, heuristic=False)


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B parameters"


def _warmup(situation: Situation) -> Choice:
    total = situation.total_updates
    most = max(int(MOST_WARMUP * total), min(1, total - 1))
    share = _warmup_share(situation)
    by_share, by_adam = _updates(share * total), _updates(2 / (1 - situation.beta2))
    value = min(most, max(by_share, by_adam))
    capped, caution = value == most, share > 0.03 and value == by_share
    if capped:
        reason = f"{value} of {total} updates ({MOST_WARMUP:.0%}) are the most that is taken unasked"
    elif by_adam >= by_share:
        reason = f"2/(1 - beta2) updates, until Adam's second moment at beta2 {situation.beta2:g} is known"
    else:
        reason = f"{share:.0%} of {total} updates"
    if caution and not capped:
        reason += "; longer for a large model, which is caution and not published evidence"
    low, high = min(value, _updates(0.03 * total)), max(most, value)
    sources = (ADAM_WARMUP, "3% of the updates: Alpaca, Vicuna, Tulu")
    return Choice(value, low, high, f"{reason}.", sources, heuristic=capped or caution)


def _warmup_share(situation: Situation) -> float:
    if situation.parameters >= VERY_LARGE:
        return 0.10
    return 0.06 if situation.parameters >= LARGE else 0.03


def _updates(number: float) -> int:
    # Rounded first, since 0.07 of 100 is 7.000000000000001 in floats.
    return math.ceil(round(number, 9))


def _shape(situation: Situation, warmup: int) -> Choice:
    samples = situation.dataset_samples
    many = samples is not None and samples >= MUCH_DATA
    if 1 / (warmup + 1) > HIGHEST_LINEAR_FLOOR:
        reason = (
            f"With {warmup} updates of warm-up a linear schedule could only fall to 1/{warmup + 1} of the "
            "peak, because WarmupDecayLR ends where it starts; cosine has a floor of its own."
        )
        return Choice("cosine", None, None, reason, ("deepspeed/runtime/lr_schedules.py",), heuristic=False)
    if situation.task == "divergent" or (many and situation.task is None):
        cause = "The task is far from pre-training" if situation.task else f"{samples} samples are much data"
        reason = f"{cause}: cosine keeps the rate high for longer; a compound schedule is the alternative."
        return Choice("cosine", None, None, reason, (), heuristic=True)
    causes = {"similar": "The task is close to pre-training"}
    cause = causes.get(situation.task or "", "The data is small" if samples else "Nothing speaks against it")
    reason = f"{cause}: linear decay is the plain start; try cosine if it converges slowly."
    sources = (
        "linear decay in pre-training: arXiv 2502.15938",
        "small data: Mosbach et al., arXiv 2006.04884",
    )
    return Choice("linear", None, None, reason, sources, heuristic=True)


def _floor(shape: str, warmup: int) -> Choice:
    if shape in ("constant", "step", "compound"):
        reason = f"A {shape} schedule has no floor of its own: its end follows from its other settings."
        return Choice(1.0 if shape == "constant" else None, None, None, reason, (), heuristic=False)
    if shape == "linear":
        reason = "WarmupDecayLR has one minimum for both ends: the end is the first update's rate, peak/(W+1)."
        share = 1 / (warmup + 1)
        return Choice(share, share, 1.0, reason, ("deepspeed/runtime/lr_schedules.py",), heuristic=False)
    value = DEFAULT_FLOORS[shape]
    reason = "A tenth of the peak is usual for cosine, and the last updates still train."
    if value == 0:
        reason = f"The decay of {shape} goes to zero, which only the update after the last would reach."
    return Choice(value, 0.0, 0.1, reason, ("decay to zero: arXiv 2502.15938",), heuristic=True)


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_TOKENS = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([kmb]?)\s*tokens?", re.IGNORECASE)
_MEND = 'updates (100), a share of the run (0.03 or "5%"), or tokens ("2M tokens")'


def parse_warmup(value: int | float | str, total_updates: int, tokens_per_update: float | None) -> int:
    """Warm-up in updates, from updates (100), a share (0.03, "5%") or tokens ("2M tokens"), rounded up.

    Raises RequestError for what is none of these, and for tokens where tokens an update are unknown.
    """
    if isinstance(value, str):
        return _parse_text(value.strip(), total_updates, tokens_per_update)
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise _no_warmup(value)
    if isinstance(value, int):
        return value
    if value < 1:
        return _updates(value * total_updates)
    if value == 1 or not value.is_integer():
        raise _no_warmup(value)
    return int(value)


def _parse_text(text: str, total_updates: int, tokens_per_update: float | None) -> int:
    if match := _TOKENS.fullmatch(text):
        if not tokens_per_update:
            message = f"a warm-up of {text} needs the tokens an update, which are unknown here"
            raise RequestError(Problem(message, key="schedule.warmup", hint="say it in updates or as a share"))
        return _updates(_number(match[1], text) * _UNITS[match[2].lower()] / tokens_per_update)
    if text.endswith("%"):
        share = _number(text[:-1], text) / 100
        if not 0 <= share <= 1:
            raise _no_warmup(text)
        return _updates(share * total_updates)
    number = _number(text, text)
    return parse_warmup(int(text) if text.isdigit() else number, total_updates, tokens_per_update)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise _no_warmup(text) from None


def _no_warmup(value: object) -> RequestError:
    return RequestError(Problem(f"{value!r} is no warm-up", key="schedule.warmup", hint=_MEND))
