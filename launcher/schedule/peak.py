"""The advised peak learning rate: a few numbers, fitted on published recipes and on a LoRA sweep.

    peak = base(method) · family · size · alpha, rounded down to 1, 1.5, 2, 3, 5 or 7 times a power of ten

It is meant to be a bit too low rather than too high: it is a low quantile of what works, rounded down. There is no
factor for the batch: published learning rates do not rise with it (the slope of their logarithm on that of the tokens
per update is -0.05). benchmarks/advice_accuracy.py fits and scores the numbers; docs/learning-rate.md explains them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from launcher.schedule.safety import peak_limit

QUANTILE = 0.4
"""The fraction of organisations (of models, in the sweep) that use less than the advice: below the middle."""

BASES: Mapping[str, float] = {
    "full": 2e-5,
    "lora": 3e-4,
    "preference": 5e-7,
    "preference-lora": 5e-6,
    "encoder": 1e-5,
}
"""The fitted learning rate by method."""

LATER_FACTOR = 0.6
"""The factor for a `later_family` if all weights are trained. It is set, not fitted: authors who publish both train
them with 1/4 to 1/6 of the learning rate of Llama 2 (MetaMath, OpenChat). Since they are few, that is pulled towards 1.
"""

SIZE_EXPONENT = 0.3
"""How fast the peak falls with size outside `FLAT_SIZES`: the usual exponent within a published family of models."""

FLAT_SIZES: Mapping[str, tuple[float, float]] = {
    "full": (3e9, 30e9),
    "preference": (3e9, 30e9),
    "encoder": (3.5e8, 3.5e8),
}
"""Parameters between which the size does not matter, by method; methods with LoRA are not here: there it never does."""

LORA_ALPHA = 32.0
"""The alpha of the sweep. The step of an adapter is proportional to alpha times the learning rate, for every rank."""

USUAL_DIGITS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def later_family(model_type: str | None, vocab_size: int | None = None) -> str | None:
    """The family of a model (model_type in its config.json) if full fine-tuning of it uses a lower learning rate.

    Llama 3 has Llama 2's model_type and a larger vocabulary. Other families have too few recipes to say.
    """
    kind = model_type or ""
    if kind in ("llama4", "mllama") or (kind == "llama" and (vocab_size or 0) >= 128_000):
        return "Llama 3"
    if kind.startswith(("qwen2", "qwen3")):
        return "Qwen 2"
    if kind.startswith(("mistral", "ministral", "mixtral")):
        return "Mistral"
    return "Gemma" if kind.startswith("gemma") else None


def advised_peak_lr(
    method: str,
    parameters: float,
    *,
    later: bool = False,
    lora_alpha: float | None = None,
    bases: Mapping[str, float] = BASES,
    later_factor: float = LATER_FACTOR,
) -> float:
    """The advised peak learning rate, never above the limit of `check_safety`; it never rises with model size.

    `later`: the model is of a `later_family`. `lora_alpha`: None if unknown.
    """
    lr = bases[method] * size_factor(method, parameters) * alpha_factor(method, lora_alpha)
    if later and method == "full":
        lr *= later_factor
    limit = peak_limit(method, parameters)
    return _rounded_down(min(lr, limit.peak_lr) if limit else lr)


def size_factor(method: str, parameters: float) -> float:
    """The factor for the model's size: 1 between the method's `FLAT_SIZES`."""
    low, high = FLAT_SIZES.get(method, (parameters, parameters))
    return float((parameters / min(max(parameters, low), high)) ** -SIZE_EXPONENT)


def alpha_factor(method: str, lora_alpha: float | None) -> float:
    """The factor for LoRA's alpha: 1 up to `LORA_ALPHA`, since nobody publishes a higher learning rate for less."""
    if not lora_alpha or not method.endswith("lora"):
        return 1.0
    return min(1.0, LORA_ALPHA / lora_alpha)


def _rounded_down(lr: float) -> float:
    # The tolerance keeps 2e-5 at 2e-5 despite rounding errors.
    lr *= 1 + 1e-9
    power = 10.0 ** math.floor(math.log10(lr))
    digits = max(usual for usual in USUAL_DIGITS if usual * power <= lr)
    return float(f"{digits * power:.1e}")
