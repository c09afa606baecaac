"""What of a model is trained: all of it, all but what is frozen, or adapters on frozen weights.

Done to the empty model that is measured, and the same to the real one of every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.job.schema import LoraSection, ModelSection

_NOTHING_LEFT = Problem(
    "every parameter is frozen, and nothing is left to train", key="model.freeze", hint="freeze fewer"
)


def set_trainable(model: Any, section: ModelSection) -> Any:
    """The model with `requires_grad` as the job asks; under model.lora peft's model around it. Raises RequestError."""
    if section.lora is not None:
        return _with_adapters(model, section.lora)
    if section.freeze:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        frozen = frozen_names(names, section.freeze)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # Tied weights have several names: any of them freezes both.
            if name in frozen:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RequestError(_NOTHING_LEFT)
    return model


def frozen_names(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """Those of the parameters `names` that a pattern matches, by their own name or by that of a module around them.

    Raises RequestError for a pattern that matches nothing, and where nothing would be left to train.
    """
    frozen: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = {name for name in names if any(fnmatchcase(part, pattern) for part in _prefixes(name))}
        if not matched:
            problems.append(_unmatched("model.freeze", pattern, {part for name in names for part in _prefixes(name)}))
        frozen |= matched
    if not problems and frozen == set(names):
        problems.append(_NOTHING_LEFT)
    if problems:
        raise RequestError(*problems)
    return frozen


def adapted_modules(model: Any) -> tuple[str, ...]:
    """The last names of the modules on which peft put adapters, sorted."""
    return tuple(sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _adapted(module)}))


def _adapted(module: Any) -> bool:
    return bool(getattr(module, "lora_A", None)) or bool(getattr(module, "lora_embedding_A", None))


def _with_adapters(model: Any, lora: LoraSection) -> Any:
    from peft import LoraConfig, get_peft_model

    asked = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    if lora.target_modules != "auto":
        _check_targets([name for name, _ in model.named_modules() if name], asked)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha == "auto" else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == "auto" else asked,
    )
    try:
        # Adapters take the model's precision: ZeRO shards parameters of one, and keeps float32 masters of its own.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RequestError(Problem(str(error), key="model.lora.target_modules")) from None
    if lora.merge:
        _check_merge(adapted)
    return adapted


def _check_merge(model: Any) -> None:
    """Raises RequestError for adapters that cannot be merged: one on tied weights would change them in both places."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if getattr(model.config, "tie_word_embeddings", False) and any(_adapted(module) for module in embeddings):
        raise RequestError(
            Problem(
                "this model's head and embeddings are one weight, and an adapter on one of them cannot be merged",
                key="model.lora.merge",
                hint="set it to false, or leave head and embeddings out of model.lora.target_modules",
            )
        )


def _check_targets(modules: Sequence[str], asked: Iterable[str]) -> None:
    """Raises RequestError for each name with which no module's name ends: peft minds only if none at all fits."""
    problems = [
        _unmatched("model.lora.target_modules", target, {name.rsplit(".", 1)[-1] for name in modules})
        for target in asked
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    if problems:
        raise RequestError(*problems)


def _unmatched(key: str, pattern: str, valid: Iterable[str]) -> Problem:
    names = sorted({name for name in valid if not name.isdigit()}, key=lambda name: (name.count("."), name))
    match = nearest(pattern, names)
    hint = f"did you mean {match}?" if match else f"there are: {', '.join(names[:12])}"
    return Problem(f"{pattern} matches nothing in this model", key=key, hint=hint)


def _prefixes(name: str) -> list[str]:
    """A parameter's name, and those of the modules that it stands in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
