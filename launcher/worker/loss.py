"""The loss of a causal language model over its learned tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from launcher.worker.batches import IGNORED


def summed_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The summed negative log-likelihood (nats, float32, a scalar) of the learned tokens of a micro-batch.

    All tensors are [sequences, length]. Only rows of logits that are learned from are brought to float32.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    targets = labels[:, 1:]
    learned = targets != IGNORED
    total = functional.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="sum")
    # A micro-batch with nothing to learn must still reach every parameter: ZeRO's ranks reduce in step.
    return total + 0.0 * logits.sum().float() if not bool(learned.any()) else total
