"""Attention within each of several sequences (documents) that share one row, without padding and without a mask.

transformers calls the attention function of a model by its name, with the arguments that the model was called with. The
function here computes each document by itself with PyTorch's sdpa, so its cost is the sum of the squared lengths. Flash
attention gets the documents' borders in transformers' own arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

NAME = "launcher_documents"
"""The name of the function among transformers' attention implementations."""


def register() -> None:
    """Adds the function to transformers' attention implementations. It can be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def document_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The arguments of a model for a row of documents of these lengths: its attention stays within each of them.

    `position_ids` [1, sum of lengths] start from 0 at each document. The others are read by the attention function.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "position_ids": positions.to(device, non_blocking=True),
        "document_lengths": tuple(lengths),
        # Read by transformers' flash attention.
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask of a row: none, since no document of the row is padded."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of a row, [1, length, heads, size]. Queries, keys and values are [1, heads, length, size].

    Raises ValueError if the model does not pass the lengths on: the documents would attend to each other.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if document_lengths is None or attention_mask is not None:
        raise ValueError(f"{type(module).__name__} does not pass on where the packed sequences of a row begin and end")
    documents = (torch.split(part, list(document_lengths), dim=2) for part in (query, key, value))
    options = {name: given for name, given in options.items() if name in _USED}
    found = []
    for queries, keys, values in zip(*documents, strict=True):
        mask = _window(queries, sliding_window)
        found.append(sdpa_attention_forward(module, queries, keys, values, mask, is_causal=True, **options)[0])
    return torch.cat(found, dim=1), None


_USED = ("dropout", "scaling", "softcap", "position_bias")
"""Options of the model that sdpa reads, or refuses. The probe of a small model finds those that have no effect here."""


def _window(queries: torch.Tensor, size: int | None) -> torch.Tensor | None:
    """The mask [length, length] of a sliding window in a document; None if it sees the whole document."""
    length = queries.shape[2]
    if size is None or length <= size:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=queries.device)
    return ones.tril().triu(1 - size)
