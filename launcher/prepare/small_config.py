"""Configs of the same architecture with few layers and small sizes, for models that are quick to build."""

from __future__ import annotations

import copy
import re
from typing import Any

VOCABULARY = 512
"""Rows of the embeddings of a small model."""
_LAYERS = 6
"""Enough for a repeating layer pattern that the config only gives as a period."""
_FIRST_LAYERS = 3
"""Kept if the config lists its layers, plus the first layer of each further kind."""
_WIDTH = 64
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER = "per_layer_config"
"""Settings of single layers, by layer number."""
_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_VALUE_KEYS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim_model")
_FOLLOWING_KEYS = ("mamba_n_heads", "mamba_num_heads", "d_inner", "mamba_d_ssm")
_EXPERTS = 16
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
_INNER = re.compile(r"intermediate|ffn_dim|n_inner|^d_ff$|dim_ff|ffn_hidden")
_TOKEN = re.compile(r"_token_(id|index)$|^(pad|bos|eos)_token_id$|_token_ids$")


def small_config(config: Any) -> Any:
    """A copy of `config` with few layers (one of each kind), few heads, few experts and a small vocabulary."""
    return type(config).from_dict(_smaller(config.to_dict(), narrow=True))


def smallest_config(config: Any) -> Any:
    """As `small_config`, with a hidden size independent of the heads if the config has a head size."""
    return type(config).from_dict(_smaller(config.to_dict(), narrow=True, free=True))


def config_with_fewer_layers(config: Any) -> Any:
    """A copy of `config` with fewer layers and tokens and unchanged widths."""
    return type(config).from_dict(_smaller(config.to_dict(), narrow=False))


def _smaller(data: dict[str, Any], *, narrow: bool, free: bool = False) -> dict[str, Any]:
    data = {
        key: _smaller(value, narrow=narrow, free=free) if _is_config(key, value) else value
        for key, value in data.items()
    }
    data = _fewer_layers(data)
    if narrow:
        data = _narrower(data, free)
    return {key: _fewer_tokens(key, value) for key, value in data.items()}


def _is_config(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key.endswith("config")


def _fewer_layers(data: dict[str, Any]) -> dict[str, Any]:
    count = next((data[key] for key in _LAYER_KEYS if isinstance(data.get(key), int)), None)
    if count is None or count <= _LAYERS:
        return data
    per_layer = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == count}
    overrides = {int(layer): value for layer, value in (data.get(_PER_LAYER) or {}).items()}
    if overrides:
        per_layer[_PER_LAYER] = [overrides.get(layer) for layer in range(count)]
    kept = list(range(_FIRST_LAYERS if per_layer else _LAYERS))
    seen = {_kind(per_layer, layer) for layer in kept}
    for layer in range(len(kept), count):
        if (kind := _kind(per_layer, layer)) not in seen:
            kept.append(layer)
            seen.add(kind)
    data = {**data, **{key: len(kept) for key in _LAYER_KEYS if data.get(key) == count}}
    data.update({key: [copy.deepcopy(value[layer]) for layer in kept] for key, value in per_layer.items()})
    if overrides:
        data[_PER_LAYER] = {layer: value for layer, value in enumerate(data[_PER_LAYER]) if value is not None}
    if "first_k_dense_replace" in data:
        data["first_k_dense_replace"] = min(1, data["first_k_dense_replace"] or 0)
    if data.get("num_kv_shared_layers"):
        # Sharing layers come last and use the keys of an earlier layer of their kind.
        data["num_kv_shared_layers"] = 1
    return data


def _kind(per_layer: dict[str, list[Any]], layer: int) -> str:
    return repr([value[layer] for value in per_layer.values()])


def _narrower(data: dict[str, Any], free: bool) -> dict[str, Any]:
    data = {key: _narrow_inner(value) if _INNER.search(key) else value for key, value in data.items()}
    chosen = next((data[key] for key in _CHOSEN_KEYS if isinstance(data.get(key), int)), 1)
    experts = max(_EXPERTS, 2 * chosen)
    data.update({key: min(data[key], experts) for key in _EXPERT_KEYS if isinstance(data.get(key), int)})
    head_key = next((key for key in _HEAD_KEYS if isinstance(data.get(key), int)), None)
    hidden_key = next((key for key in _HIDDEN_KEYS if isinstance(data.get(key), int)), None)
    if not head_key or not hidden_key:
        return data
    heads, hidden = data[head_key], data[hidden_key]
    groups = next((key for key in _KEY_VALUE_KEYS if isinstance(data.get(key), int)), None)
    each = heads // data[groups] if groups and data[groups] else 1
    fewer = each if each > 1 else next(few for few in (4, 3, 2, 1) if heads % few == 0)
    if heads % fewer or hidden * fewer % heads:
        return data
    data[head_key] = fewer
    if groups:
        data[groups] = fewer // each
    narrowed = hidden * fewer // heads
    if free and isinstance(data.get("head_dim"), int):
        narrowed = min(narrowed, 2 * _WIDTH)
    data.update({key: data[key] * narrowed // hidden for key in _FOLLOWING_KEYS if isinstance(data.get(key), int)})
    # Sizes equal to the hidden size, such as another embedding's, change with it.
    return {key: narrowed if _is_size(key, value, hidden) else value for key, value in data.items()}


def _is_size(key: str, value: Any, hidden: int) -> bool:
    return isinstance(value, int) and value == hidden and "vocab" not in key and "position" not in key


def _narrow_inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_narrow_inner(each) for each in value]
    return min(value, _WIDTH) if isinstance(value, int) and not isinstance(value, bool) else value


def _fewer_tokens(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and "vocab" in key and "size" in key:
        return min(value, VOCABULARY)
    if _TOKEN.search(key):
        if isinstance(value, int):
            return value if value < VOCABULARY else VOCABULARY - 1
        if isinstance(value, list) and all(isinstance(each, int) for each in value):
            return sorted({min(each, VOCABULARY - 1) for each in value})
    return value
