"""Probes with which attention a small model computes packed sequences exactly as it computes them one by one.

A config does not show what a model does with several sequences in one row: states of linear attention, convolutions or
masks built in the code may leak from one into the next. The logits of a small instance show it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

FLASH = ("flash_attention_2", "flash_attention_3")
_LENGTHS = (5, 3, 4)
_WINDOW = 2
"""A sliding window that is shorter than the sequences of the probe."""
_TOLERANCE = 1e-3
"""As a fraction of the logits' standard deviation."""
_LAYERS = {"full_attention", "sliding_attention"}
_UNSEEN = ("index_topk", "attention_chunk_size", "attn_temperature_tuning")
"""Settings that only have an effect in sequences that are longer than the probe's."""
_UNSEEN_POSITIONS = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest sequence of a row."""


def packed_attention(model: Any, ids: Any) -> tuple[str, ...]:
    """The attention implementations with which the logits of packed sequences equal those of single ones.

    "sdpa" means `launcher.document_attention`. `model` is a small float32 instance; `ids` are normal tokens, [1, 12].
    """
    if not _can_be_probed(model):
        return ()
    with _short_window(model), flash_imitation():
        return tuple(name for name in ("sdpa", *FLASH) if _equal(model, name, ids[:, : sum(_LENGTHS)]))


def _can_be_probed(model: Any) -> bool:
    """Whether the attention can be exchanged, and a short row shows all of what the model does."""
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    windows = "sliding_attention" not in layers or isinstance(getattr(text, "sliding_window", None), int)
    unseen = any(getattr(text, name, None) for name in _UNSEEN)
    unseen |= bool(_texts_in(getattr(text, "rope_parameters", None)) & _UNSEEN_POSITIONS)
    return bool(getattr(model, "_supports_attention_backend", False)) and layers <= _LAYERS and windows and not unseen


def _texts_in(value: Any) -> set[str]:
    """All texts in nested mappings."""
    if isinstance(value, dict):
        return set().union(*(_texts_in(each) for each in value.values()))
    return {value} if isinstance(value, str) else set()


def _equal(model: Any, name: str, row: Any) -> bool:
    """Whether the packed logits are those of the sequences alone, and those of one long sequence are not."""
    import torch

    from launcher.document_attention import NAME, document_inputs

    try:
        alone = [_logits(model, sequence) for sequence in row.split(_LENGTHS, dim=1)]
        with using_attention(model, NAME if name == "sdpa" else name):
            packed = _logits(model, row, **document_inputs(_LENGTHS, row.device))
            joined = _logits(model, row, **document_inputs([row.shape[1]], row.device))
    except Exception:  # The model's code may refuse the arguments in any way.
        return False
    expected = torch.cat(alone)
    tolerance = _TOLERANCE * float(expected.std())
    # Without the second check a model in which attention has no effect would pass.
    return _distance(packed, expected) <= tolerance < _distance(joined, expected)


def _logits(model: Any, ids: Any, **options: Any) -> Any:
    return model(input_ids=ids, use_cache=False, **options).logits[0].float()


def _distance(first: Any, second: Any) -> float:
    return float((first - second).abs().max())


@contextlib.contextmanager
def using_attention(model: Any, name: str) -> Iterator[None]:
    """Sets the attention implementation of all the model's configs inside the block.

    transformers' own setter refuses flash attention on a CPU.
    """
    from launcher.document_attention import register

    register()
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextlib.contextmanager
def _short_window(model: Any) -> Iterator[None]:
    """Sets the sliding windows of the model to a few tokens inside the block."""
    owners = [model.config.get_text_config(), *model.modules()]
    before = [(owner, owner.sliding_window) for owner in owners if isinstance(_window_of(owner), int)]
    for owner, _ in before:
        owner.sliding_window = _WINDOW
    try:
        yield
    finally:
        for owner, size in before:
            owner.sliding_window = size


def _window_of(owner: Any) -> Any:
    return vars(owner).get("sliding_window", getattr(type(owner), "sliding_window", None))


@contextlib.contextmanager
def flash_imitation() -> Iterator[None]:
    """Replaces flash attention inside the block by a function that computes what it would, from the same arguments."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in FLASH:
        ALL_ATTENTION_FUNCTIONS[name] = _as_flash
    try:
        yield
    finally:
        for name in FLASH:
            del ALL_ATTENTION_FUNCTIONS[name]


def _as_flash(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, cu_seq_lens_q: Any = None, **options: Any
) -> Any:
    """Attention as flash attention's, which takes the borders of documents; without them the row is one document."""
    from launcher.document_attention import attend

    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    return attend(module, query, key, value, attention_mask, **{**options, "document_lengths": lengths})
