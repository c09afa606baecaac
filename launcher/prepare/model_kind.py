"""Which kinds of model the launcher can fine-tune, and what their kind adds to the loss."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.job.schema import ModelSection
from launcher.prepare.small_model_probe import ModelProbeResult

_KEY = "model.name_or_path"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of the balance loss coefficient in configs and classes of transformers."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOLERANCE = 1e-4
"""Between two float32 losses that are computed in different ways."""


def check_config(config: Any, section: ModelSection) -> None:
    """Raises RequestError for an encoder-decoder and for quantised weights, according to the config."""
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(
            Problem(
                f"{config.model_type} is an encoder-decoder, and the launcher only fine-tunes decoder-only models: "
                "it would train the decoder without the encoder",
                key=_KEY,
                hint="choose a decoder-only (causal) language model",
            )
        )
    method = quantisation(config)
    if method is not None:
        raise RequestError(_quantised(method, section))


def quantisation(config: Any) -> str | None:
    """The quantisation method of the checkpoint's weights; None if they are not quantised."""
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
    """Raises RequestError if weights of the model are missing in the checkpoint or have another shape there.

    `loading` is the output_loading_info of from_pretrained. `parameters` are the names of the model's parameters:
    buffers may be missing, because the model computes them.
    """
    mismatched = sorted(str(each[0] if isinstance(each, tuple) else each) for each in loading["mismatched_keys"])
    if mismatched:
        raise RequestError(
            _weights_problem(folder, f"has {_some(mismatched)} in another shape than in its config.json")
        )
    missing = sorted(name for name in loading["missing_keys"] if name in parameters)
    if missing:
        raise RequestError(_weights_problem(folder, f"lacks {_some(missing)}: they would be initialised randomly"))


def _weights_problem(folder: str, found: str) -> Problem:
    return Problem(
        f"the checkpoint in {folder} {found}",
        key=_KEY,
        hint="use a complete checkpoint of a causal language model, with the config.json that belongs to it",
    )


def unused_weights(loading: dict[str, Any]) -> Iterator[str]:
    """A note if the checkpoint has weights that the causal language model does not have."""
    unused = sorted(loading["unexpected_keys"])
    if unused:
        yield (
            f"The checkpoint has weights that the causal language model does not use: {_some(unused)}. They are "
            "neither trained nor exported."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_causal(config: Any, probe: ModelProbeResult) -> None:
    """Raises RequestError for a model in which a later token changes an earlier logit."""
    if probe.causal is False:
        raise RequestError(
            Problem(
                f"{config.model_type} is not causal: changing a later token changes earlier logits, so the model would "
                "learn to copy the token that it should predict",
                key=_KEY,
                hint="choose a decoder-only (causal) language model" + _decoder_hint(config),
            )
        )


def _decoder_hint(config: Any) -> str:
    if getattr(config, "is_decoder", None) is not False:
        return ""
    return "; if these weights were trained as a decoder, set is_decoder: true in the model's config.json"


def router_loss_coefficient(config: Any, probe: ModelProbeResult) -> float | None:
    """The coefficient of the routers' balance loss; None if the config does not enable it or the model has none.

    Raises RequestError if the config enables a balance loss that cannot be reproduced.
    """
    if not uses_router_loss(config):
        return None
    found = [value for value in _coefficients(config) if value is not None]
    if probe.failure is not None:
        return found[0] if found else None
    if probe.router_loss is None or probe.own_loss is None or probe.plain_loss is None:
        return None
    for coefficient in found:
        if abs(probe.own_loss - probe.plain_loss - coefficient * probe.router_loss) <= _TOLERANCE * (
            1 + probe.own_loss
        ):
            return coefficient
    raise RequestError(
        Problem(
            f"the balance loss of {config.model_type}'s routers cannot be reproduced: its coefficient is unknown",
            key=_KEY,
            hint="to train without it, set output_router_logits: false in a copy of the model's config.json",
        )
    )


def uses_router_loss(config: Any) -> bool:
    """Whether the config returns router logits: transformers then adds their balance loss."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _coefficients(config: Any) -> Iterator[float | None]:
    text = config.get_text_config()
    for part in (text, getattr(text, "ffn_config", None)):
        for name in _COEFFICIENTS:
            value = getattr(part, name, None)
            yield float(value) if isinstance(value, int | float) else None


def kind_notes(config: Any, probe: ModelProbeResult, coefficient: float | None) -> Iterator[str]:
    """Notes on the model's kind."""
    if probe.failure is not None:
        yield (
            f"The launcher could not check that {config.model_type} is causal (that later tokens do not change earlier "
            f"logits), because a small instance of it failed: {probe.failure}."
        )
    text = config.get_text_config()
    experts = next((value for name in _EXPERTS if isinstance(value := getattr(text, name, None), int)), 0)
    if experts > 1 and coefficient is None:
        yield _unbalanced(config, probe)
    elif probe.own_loss is not None and coefficient is None and probe.shifts_labels and _differs(probe):
        yield (
            f"For {config.model_type} transformers computes another loss than the launcher, which uses next-token "
            "cross entropy."
        )


def _differs(probe: ModelProbeResult) -> bool:
    assert probe.own_loss is not None and probe.plain_loss is not None
    return abs(probe.own_loss - probe.plain_loss) > _TOLERANCE * (1 + probe.own_loss)


def _unbalanced(config: Any, probe: ModelProbeResult) -> str:
    if uses_router_loss(config) or not (probe.has_router_loss or probe.failure):
        return (
            f"The routers of this model's experts are trained without a balance loss: transformers has none for "
            f"{config.model_type}."
        )
    return (
        "The routers of this model's experts are trained without a balance loss, as set in the model's config. To add "
        "it, set output_router_logits: true in a copy of the model's config.json."
    )
