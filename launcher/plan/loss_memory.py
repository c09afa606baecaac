"""Memory of the loss: the logits of all tokens at once, or of a chunk of tokens at a time. Pure."""

from __future__ import annotations

from launcher.plan.facts import ModelFacts

_CHUNK_ELEMENTS = 2**25
"""Logits of one chunk: 128 MiB in float32."""
_SMALLEST_CHUNK = 256
"""Tokens: below this, matrix products are slow."""


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens have their logits in memory at once if the loss is chunked."""
    return max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // vocab_size)


def logits_bytes(model: ModelFacts, tokens: int) -> int:
    """The logits of all tokens, in the forward and backward pass."""
    return tokens * model.vocab_size * 12


def chunk_bytes(model: ModelFacts, tokens: int, width: int) -> int:
    """The logits of one chunk and, from the first chunk to the backward pass, the gradient of the output layer.

    `width` is the number of bytes of a parameter. The gradient is summed in float32 and then copied to that width.
    """
    copy = width if width < 4 else 0
    chunk = min(tokens, chunk_tokens(model.vocab_size)) * model.vocab_size * (4 + copy)
    trained = model.adapted_modules == ()
    return chunk + (model.vocab_size * model.hidden_size * (4 + copy) if trained else 0)
