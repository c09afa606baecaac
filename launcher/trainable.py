"""Sets which parameters of a model are trained: all, all except frozen ones, or adapters on frozen weights.

Used for the empty model that is measured and for the real model of every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.job.schema import LoraSection, ModelSection

_NOTHING_LEFT = Problem(
    "every parameter is frozen, so nothing is left to train", key="model.freeze", hint="freeze fewer parameters"
)


def set_trainable(model: Any, section: ModelSection) -> Any:
    """The model with `requires_grad` set as in the job; with model.lora, peft's wrapper of it. Raises RequestError."""
    if section.lora is not None:
        return _add_adapters(model, section.lora)
    if section.freeze:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        frozen = frozen_names(names, section.freeze)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # A tied weight has several names; each of them freezes it.
            if name in frozen:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RequestError(_NOTHING_LEFT)
    return model


def frozen_names(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """The parameters in `names` that a pattern matches, by their name or by the name of a module that contains them.

    Raises RequestError for a pattern that matches nothing, or if nothing is left to train.
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
    """The last parts of the names of the modules with adapters, sorted."""
    return tuple(sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _has_adapter(module)}))


def _has_adapter(module: Any) -> bool:
    return bool(getattr(module, "lora_A", None)) or bool(getattr(module, "lora_embedding_A", None))


def _add_adapters(model: Any, lora: LoraSection) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    if lora.target_modules != "auto":
        _check_targets([name for name, _ in model.named_modules() if name], targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.effective_alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == "auto" else targets,
    )
    try:
        # Adapters use the model's precision: ZeRO shards parameters of one dtype and keeps its own float32 masters.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RequestError(Problem(str(error), key="model.lora.target_modules")) from None
    if lora.merge:
        _check_merge(adapted)
    return adapted


def _check_merge(model: Any) -> None:
    """Raises RequestError for an adapter on a tied weight: merging it would change both embeddings and head."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if getattr(model.config, "tie_word_embeddings", False) and any(_has_adapter(module) for module in embeddings):
        raise RequestError(
            Problem(
                "this model's head and embeddings are tied, and an adapter on one of them cannot be merged",
                key="model.lora.merge",
                hint="set it to false, or remove head and embeddings from model.lora.target_modules",
            )
        )


def _check_targets(modules: Sequence[str], targets: Iterable[str]) -> None:
    """Raises RequestError for every target that matches no module: peft raises only if no target matches."""
    problems = [
        _unmatched("model.lora.target_modules", target, {name.rsplit(".", 1)[-1] for name in modules})
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    if problems:
        raise RequestError(*problems)


def _unmatched(key: str, pattern: str, valid: Iterable[str]) -> Problem:
    names = sorted({name for name in valid if not name.isdigit()}, key=lambda name: (name.count("."), name))
    match = nearest(pattern, names)
    hint = f"did you mean {match}?" if match else f"names in this model: {', '.join(names[:12])}"
    return Problem(f"{pattern} matches nothing in this model", key=key, hint=hint)


def _prefixes(name: str) -> list[str]:
    """A parameter's name, and the names of the modules that contain it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
