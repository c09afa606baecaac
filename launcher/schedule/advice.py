"""Advice on peak learning rate, warm-up, shape and floor, each with a reason, and on what to try next.

The peak is in peak.py. The rest follows rules of published recipes; what has no evidence is marked as heuristic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.schedule.curve import DEFAULT_FLOORS, Schedule, make_schedule
from launcher.schedule.peak import (
    BASES,
    FLAT_SIZES,
    LATER_FACTOR,
    LORA_ALPHA,
    QUANTILE,
    SIZE_EXPONENT,
    advised_peak_lr,
    alpha_factor,
    later_family,
    size_factor,
)
from launcher.schedule.safety import peak_limit
from launcher.schedule.warmup import whole_updates


@dataclass(frozen=True)
class Situation:
    """What the run trains. `tokens_per_update` and `dataset_samples` are None if unknown.

    method: "full", "lora", "preference", "preference-lora" or "encoder"; task: "similar" to the pre-training data,
    "divergent" from it, or None. `model_type` is that of the model's config.json. The rest is None if unknown.
    """

    parameters: int
    method: str
    tokens_per_update: float | None
    total_updates: int
    dataset_samples: int | None = None
    beta2: float = 0.999
    task: str | None = None
    model_type: str | None = None
    vocab_size: int | None = None
    lora_alpha: float | None = None


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
    """Peak learning rate, warm-up in updates, shape, and floor as a fraction of the peak.

    `sweep` is what would settle the peak: the values to try and what they cost. `beta2` is Adam's, at another batch.
    """

    peak_lr: Choice
    warmup_updates: Choice
    shape: Choice
    floor: Choice
    sweep: Choice
    beta2: Choice


LARGE, VERY_LARGE = 6e9, 30e9
MANY_SAMPLES = 100_000
MAX_WARMUP = 0.2
MAX_LINEAR_FLOOR = 0.1

MIN_SHORT_TRIAL = 100
"""Updates below which a trial of a quarter of the run is too short to compare learning rates."""

RECIPES = "recipes.csv: published recipes, each with its source"
LORA_SWEEP = "lora_sweep.csv: the best LoRA learning rates of 18 models"
OVER_TRAINED = "more pre-training makes fine-tuning more fragile: arXiv 2503.19206"
ADAM_WARMUP = "Ma & Yarats, arXiv 1910.04209"
BETA2 = "small batches: arXiv 2507.07101"
WARMUP_TOLERANCE = "Kalra & Barkeshli, arXiv 2406.09405"


def advise(situation: Situation, *, shape: str | None = None, warmup_updates: int | None = None) -> Advice:
    """Advice for a run. `shape` and `warmup_updates`, if given, are fixed; the rest of the advice fits them.

    Raises RequestError for an invalid situation.
    """
    _check(situation)
    warmup = _warmup(situation)
    length = warmup.value if warmup_updates is None else warmup_updates
    advised_shape = _shape(situation, length)
    peak, floor = _peak(situation), _floor(shape or advised_shape.value, length)
    return Advice(peak, warmup, advised_shape, floor, _sweep(situation, peak.value), _beta2(situation.beta2))


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
    if situation.method not in BASES:
        close = nearest(situation.method, BASES)
        hint = f"did you mean {close}?" if close else ", ".join(BASES)
        raise RequestError(Problem(f"unknown method {situation.method!r}", hint=hint))
    if situation.task not in (None, "similar", "divergent"):
        message = f"unknown task {situation.task!r}"
        raise RequestError(Problem(message, key="schedule.task", hint="similar or divergent"))
    if situation.parameters < 1 or situation.total_updates < 1 or not 0 <= situation.beta2 < 1:
        raise RequestError("advice needs 1 or more parameters, 1 or more updates, and 0 <= beta2 < 1")


def _peak(situation: Situation) -> Choice:
    family = later_family(situation.model_type, situation.vocab_size) if situation.method == "full" else None
    value = advised_peak_lr(
        situation.method, situation.parameters, later=family is not None, lora_alpha=situation.lora_alpha
    )
    limit = peak_limit(situation.method, situation.parameters)
    high = min(2 * value, limit.peak_lr) if limit else 2 * value
    sources = (LORA_SWEEP,) if situation.method == "lora" else (RECIPES, *([OVER_TRAINED] if family else []))
    return Choice(value, value / 2, max(value, high), _peak_reason(situation, family), sources, heuristic=False)


def _peak_reason(situation: Situation, family: str | None) -> str:
    method, base = situation.method, f"{BASES[situation.method]:g}"
    if method == "lora":
        source = (
            f"{base} is the {QUANTILE:.0%} quantile of the best learning rates of 18 models at alpha {LORA_ALPHA:g}"
        )
    else:
        source = f"{base} is the {QUANTILE:.0%} quantile of published {method} recipes, each organisation counted once"
    parts = [f"{source}: a bit low on purpose"]
    if family:
        parts.append(f"{family}, as other later families, gets {LATER_FACTOR:g} of that")
    size = size_factor(method, situation.parameters)
    if size != 1:
        parts.append(f"{_billions(situation.parameters)} scale it by {size:.2g} (to the power -{SIZE_EXPONENT:g})")
    alpha = alpha_factor(method, situation.lora_alpha)
    if alpha != 1:
        parts.append(f"alpha {situation.lora_alpha:g} scales it by {alpha:.2g}")
    flat = "the batch does" if method in FLAT_SIZES else "rank, size and batch do"
    return f"{'; '.join(parts)}; {flat} not change it; rounded down."


def _sweep(situation: Situation, peak: float) -> Choice:
    limit = peak_limit(situation.method, situation.parameters)
    tried = [peak * factor for factor in (0.5, 1, 2, 4) if limit is None or peak * factor <= limit.peak_lr]
    values, total = ",".join(f"{lr:g}" for lr in tried), situation.total_updates
    quarter = whole_updates(total / 4)
    short = quarter >= MIN_SHORT_TRIAL
    length, runs = (f" and train.max_steps={quarter}", len(tried) / 4) if short else ("", float(len(tried)))
    reason = (
        f"To settle the peak on your data, run the job with each of schedule.peak_lr={values}{length}, and compare the "
        f"evaluation loss: {len(tried)} runs that take {runs:g} times the GPU time of this one. "
        "If two are close, take the lower learning rate"
    )
    reason += ": a shorter run favours a higher one." if short else "."
    sources = ("short runs favour a higher learning rate: thinkingmachines.ai/blog/lora",) if short else ()
    return Choice(values, None, None, reason, sources, heuristic=True)


def _beta2(beta2: float) -> Choice:
    half, double = (adjusted_beta2(beta2, 1, factor) for factor in (0.5, 2))
    reason = (
        "If you change the batch size, beta2^(new batch / old batch) lets Adam average over as many tokens as before: "
        f"{half:.6g} at half the batch, {double:.6g} at twice. The launcher does not change it."
    )
    return Choice(beta2, None, None, reason, (BETA2,), heuristic=False)


def adjusted_beta2(beta2: float, old_batch: float, new_batch: float) -> float:
    """The beta2 with which Adam's second moment averages over as many tokens with the new batch as with the old one."""
    return float(beta2 ** (new_batch / old_batch))


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B parameters"


def _warmup(situation: Situation) -> Choice:
    total = situation.total_updates
    longest = max(int(MAX_WARMUP * total), min(1, total - 1))
    fraction = _warmup_fraction(situation)
    by_fraction, by_adam = whole_updates(fraction * total), whole_updates(2 / (1 - situation.beta2))
    value = min(longest, max(by_fraction, by_adam))
    capped, caution = value == longest, fraction > 0.03 and value == by_fraction
    if capped:
        wanted = f"2/(1 - beta2) at beta2 {situation.beta2:g}" if by_adam >= by_fraction else f"{fraction:.0%} of them"
        reason = f"{value} of {total} updates is the longest warm-up that the launcher chooses ({MAX_WARMUP:.0%})"
        reason += f"; {wanted} would be {max(by_adam, by_fraction)}"
    elif by_adam >= by_fraction:
        reason = f"2/(1 - beta2) updates, for Adam's second moment at beta2 {situation.beta2:g} to converge"
    else:
        reason = f"{fraction:.0%} of {total} updates"
    if caution and not capped:
        reason += (
            "; the usual 3% is lengthened for a large model as a caution: no published recipe does that, but a longer "
            "warm-up lets a model tolerate a higher learning rate"
        )
    low, high = min(value, whole_updates(0.03 * total)), max(longest, value)
    sources = (ADAM_WARMUP, "3% of the updates: Alpaca, Vicuna, Tulu", *([WARMUP_TOLERANCE] if caution else []))
    return Choice(value, low, high, f"{reason}.", sources, heuristic=capped or caution)


def _warmup_fraction(situation: Situation) -> float:
    if situation.parameters >= VERY_LARGE:
        return 0.10
    return 0.06 if situation.parameters >= LARGE else 0.03


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
        reason = (
            "WarmupDecayLR has one minimum for both ends: it ends at the first update's learning rate, peak/(W+1). "
            "schedule.floor: 0 decays to zero, with a scheduler object of the launcher."
        )
        floor = 1 / (warmup + 1)
        return Choice(floor, floor, 1.0, reason, ("deepspeed/runtime/lr_schedules.py",), heuristic=False)
    value = DEFAULT_FLOORS[shape]
    reason = "A tenth of the peak is usual for cosine, so the last updates still train."
    if value == 0:
        reason = f"The decay of {shape} goes to zero, which it would reach one update after the last."
    return Choice(value, 0.0, 0.1, reason, ("decay to zero: arXiv 2502.15938",), heuristic=True)
