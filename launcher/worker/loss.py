"""The loss of a causal language model over its learned tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from launcher.worker.batches import IGNORED
from launcher.worker.sequence import WHOLE, Part


def summed_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    fused: bool = False,
    part: Part = WHOLE,
) -> torch.Tensor:
    """The summed negative log-likelihood (nats, float32, a scalar) of the learned tokens of a micro-batch.

    All tensors are [sequences, length]. Only rows of logits that are learned from are brought to float32. `fused`
    leaves the loss to the model, for liger-kernel's, which makes no logits at all. Of sequences that several ranks
    share, the sum is over this rank's `part`.
    """
    if fused:
        # A mean over "one item" is the sum, as transformers' causal loss and liger-kernel's both have it.
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        total: torch.Tensor = model(**batch, use_cache=False, num_items_in_batch=1).loss
        return total
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if part.size > 1:
        # Padding stands at the end, where causal attention does not look; positions are those of the whole sequence.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        inputs = {"input_ids": part.cut(input_ids, 0), "position_ids": part.cut(positions, 0)}
        targets = part.cut(targets, IGNORED)
    logits = model(**inputs, use_cache=False).logits
    learned = targets != IGNORED
    total = functional.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
    # A micro-batch with nothing to learn must still reach every parameter: ZeRO's ranks reduce in step.
    # One number of each sequence does, where a sum over all of them would overflow float16.
    return total if bool(learned.any()) else total + 0.0 * logits[:, :1, :1].float().sum()
