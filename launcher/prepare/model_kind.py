"""Which kinds of model can be fine-tuned here, and what their kind adds to the loss."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.job.schema import ModelSection
from launcher.prepare.probe import Probe

_KEY = "model.name_or_path"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""By what names configs and classes of transformers call the weight of the balance loss."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOLERANCE = 1e-4
"""Of two losses in float32 that are computed in different ways."""


def check_config(config: Any, section: ModelSection) -> None:
    """Raises RequestError for an encoder-decoder and for quantised weights; both show in the config."""
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(
            Problem(
                f"{config.model_type} is an encoder-decoder, and only decoder-only models can be fine-tuned here: "
                "its decoder alone would be trained, without its encoder",
                key=_KEY,
                hint="choose a decoder-only (causal) language model",
            )
        )
    method = quantisation(config)
    if method is not None:
        raise RequestError(_quantised(method, section))


def quantisation(config: Any) -> str | None:
    """The quantisation method of the checkpoint's weights, None where they are not quantised."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            found = getattr(part, name, None)
            if found:
                values = found if isinstance(found, dict) else found.to_dict()
                return str(getattr(values.get("quant_method"), "value", values.get("quant_method") or "unknown method"))
    return None


def _quantised(method: str, section: ModelSection) -> Problem:
    if section.lora is not None:
        found = f"the weights are quantised ({method}), and adapters on quantised weights (QLoRA) are not supported"
    else:
        found = f"the weights are quantised ({method}), and quantised weights cannot be trained"
    return Problem(
        found,
        key=_KEY,
        hint="use the original checkpoint, in bfloat16, float16 or float32; model.lora saves memory",
    )


def check_weights(loading: dict[str, Any], parameters: Container[str], folder: str) -> None:
    """Raises RequestError if weights of the model are not in the checkpoint or have another shape there.

    `loading` is what from_pretrained reports with output_loading_info. `parameters` are the model's by name: buffers,
    which it computes itself, may be missing.
    """
    mismatched = sorted(str(each[0] if isinstance(each, tuple) else each) for each in loading["mismatched_keys"])
    if mismatched:
        raise RequestError(_unfit(folder, f"has {_some(mismatched)} in another shape than its config.json says"))
    missing = sorted(name for name in loading["missing_keys"] if name in parameters)
    if missing:
        raise RequestError(_unfit(folder, f"lacks {_some(missing)}, which would be trained from random values"))


def _unfit(folder: str, found: str) -> Problem:
    return Problem(
        f"the checkpoint in {folder} {found}",
        key=_KEY,
        hint="use a complete checkpoint of a causal language model, with the config.json that belongs to it",
    )


def unused_weights(loading: dict[str, Any]) -> Iterator[str]:
    """A note if the checkpoint has weights that the causal language model does not."""
    unused = sorted(loading["unexpected_keys"])
    if unused:
        yield (
            f"The checkpoint has weights that the causal language model does not use: {_some(unused)}. They are "
            "neither trained nor exported."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_probe(config: Any, seen: Probe) -> None:
    """Raises RequestError for a model in which a later token changes an earlier logit."""
    if seen.causal is False:
        raise RequestError(
            Problem(
                f"{config.model_type} is not causal: changing a later token changes earlier logits, so that the model "
                "would learn to copy the token that it should predict",
                key=_KEY,
                hint="choose a decoder-only (causal) language model" + _decoder_hint(config),
            )
        )


def _decoder_hint(config: Any) -> str:
    if getattr(config, "is_decoder", None) is not False:
        return ""
    return "; if these weights were trained as a decoder, set is_decoder: true in the model's config.json"


def router_loss_coefficient(config: Any, seen: Probe) -> float | None:
    """How many times the routers' balance loss is added; None where the config asks for none or the model has none.

    Raises RequestError where the config asks for one that cannot be reproduced.
    """
    if not asks_for_router_loss(config):
        return None
    found = [value for value in _coefficients(config) if value is not None]
    if seen.failure is not None:
        return found[0] if found else None
    if seen.router_loss is None or seen.own_loss is None or seen.plain_loss is None:
        return None
    for coefficient in found:
        if abs(seen.own_loss - seen.plain_loss - coefficient * seen.router_loss) <= _TOLERANCE * (1 + seen.own_loss):
            return coefficient
    raise RequestError(
        Problem(
            f"the balance loss of {config.model_type}'s routers cannot be reproduced: its coefficient was not found",
            key=_KEY,
            hint="set output_router_logits: false in a copy of the model's config.json, to train without it",
        )
    )


def asks_for_router_loss(config: Any) -> bool:
    """Whether the config has the routers' logits returned, with which transformers adds their balance loss."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _coefficients(config: Any) -> Iterator[float | None]:
    text = config.get_text_config()
    for part in (text, getattr(text, "ffn_config", None)):
        for name in _COEFFICIENTS:
            value = getattr(part, name, None)
            yield float(value) if isinstance(value, int | float) else None


def kind_notes(config: Any, seen: Probe, coefficient: float | None) -> Iterator[str]:
    """What matters of the model's kind and is not an error."""
    if seen.failure is not None:
        yield (
            f"It was not checked that {config.model_type} is causal (that a later token leaves earlier logits as they "
            f"are), because a small instance of it could not be run: {seen.failure}."
        )
    text = config.get_text_config()
    experts = next((value for name in _EXPERTS if isinstance(value := getattr(text, name, None), int)), 0)
    if experts > 1 and coefficient is None:
        yield _unbalanced(config, seen)
    elif seen.own_loss is not None and coefficient is None and seen.shifts_labels and _differs(seen):
        yield (
            f"transformers computes another loss for {config.model_type} than the cross entropy of the next token, "
            "which is what the launcher trains."
        )


def _differs(seen: Probe) -> bool:
    assert seen.own_loss is not None and seen.plain_loss is not None
    return abs(seen.own_loss - seen.plain_loss) > _TOLERANCE * (1 + seen.own_loss)


def _unbalanced(config: Any, seen: Probe) -> str:
    if asks_for_router_loss(config) or not (seen.has_router_loss or seen.failure):
        return (
            f"The routers of this model's experts are trained without a balance loss: transformers has none for "
            f"{config.model_type}."
        )
    return (
        "The routers of this model's experts are trained without a balance loss, as the model's config says. To add "
        "it, set output_router_logits: true in a copy of the model's config.json."
    )
