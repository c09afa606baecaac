"""The sizes of a model, under the various names that configs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.plan.facts import ModelFacts


def model_sizes(folder: Path, config: Any, model: Any) -> ModelFacts:
    """The facts of a model if all its parameters are trained.

    `model` may be on the meta device. Of sizes that differ between layers, the largest counts.
    """
    text = config.get_text_config()
    inputs, outputs = _embedding(model, "input"), _embedding(model, "output")
    embedding = {id(weight): weight.numel() for weight in (inputs, outputs) if weight is not None}
    hidden = _size(text, "hidden_size", "n_embd", "d_model") or (0 if inputs is None else int(inputs.shape[1]))
    heads = attention_heads(text)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(
        folder=str(folder),
        model_type=str(config.model_type),
        parameters=parameters,
        trainable_parameters=parameters,
        embedding_parameters=sum(embedding.values()),
        hidden_size=hidden,
        intermediate_size=_size(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        layers=_size(text, "num_hidden_layers", "n_layer", "num_layers") or _longest_list(model),
        attention_heads=heads,
        key_value_heads=_size(text, "num_key_value_heads"),
        whole_attention=bool(heads) and whole_attention(text, model),
        vocab_size=int(inputs.shape[0]) if inputs is not None else int(text.vocab_size),
        max_positions=_size(text, "max_position_embeddings"),
        tied_embeddings=len(embedding) == 1,
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        supports_gradient_checkpointing=bool(model.supports_gradient_checkpointing),
        has_chat_template=_has_chat_template(folder),
    )


def attention_heads(text: Any) -> int:
    """The number of attention heads; 0 for a model without attention."""
    return _size(text, "num_attention_heads", "n_head", "num_heads") or 0


def whole_attention(text: Any, model: Any) -> bool:
    """Whether every layer has full attention through transformers' exchangeable attention interface."""
    kinds = set(_attribute(text, "layer_types") or ["full_attention"])
    window = _attribute(text, "sliding_window") if getattr(text, "use_sliding_window", True) else None
    exchangeable = bool(getattr(model, "_supports_attention_backend", False))
    return exchangeable and kinds == {"full_attention"} and window is None


def _embedding(model: Any, side: str) -> Any:
    """The weight of the input or output embeddings, None if the model does not expose it."""
    try:
        module = getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(module, "weight", None)
    return weight if weight is not None and weight.dim() == 2 else None


def _size(config: Any, *names: str) -> int | None:
    """The first of the sizes that the config has; the largest of a list."""
    for name in names:
        value = _attribute(config, name)
        if isinstance(value, list | tuple):
            value = max((each for each in value if isinstance(each, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        # Some configs raise for a size that differs between layers.
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _longest_list(model: Any) -> int:
    """The number of layers if the config does not have it: the length of the longest module list."""
    from torch.nn import ModuleList

    return max((len(module) for module in model.modules() if isinstance(module, ModuleList)), default=1)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text()
