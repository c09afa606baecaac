"""The loss of a causal language model over its learned tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from launcher.errors import LauncherError
from launcher.worker.batches import IGNORED
from launcher.worker.ulysses import WHOLE, Part


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

    The loss of `summed_losses`, for a model whose routers have no balance loss.
    """
    return summed_losses(model, input_ids, attention_mask, labels, fused=fused, part=part)[0]


def summed_losses(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    fused: bool = False,
    part: Part = WHOLE,
    router_coefficient: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of a micro-batch that is trained, the part of it that balances the experts' routers): both scalars.

    The loss is the summed negative log-likelihood (nats, float32) of the learned tokens. With `router_coefficient` the
    balance loss that the model returns is added, that many times for each learned token: divided by the update's
    learned tokens it is the mean over micro-batches, each weighted by its learned tokens, and for a single micro-batch
    transformers' own loss.

    All tensors are [sequences, length]. Only rows of logits that are learned from are brought to float32. `fused`
    leaves the loss to the model, for liger-kernel's, which makes no logits at all. Of sequences that several ranks
    share, the sum is over this rank's `part`.
    """
    if fused:
        # A mean over "one item" is the sum, as transformers' causal loss and liger-kernel's both have it.
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        output = model(**batch, use_cache=False, num_items_in_batch=1)
        total: torch.Tensor = output.loss
        router = _router_loss(output, labels, router_coefficient)
        # The model has added its balance loss once.
        return total + router - _router_loss(output, None, router_coefficient), router
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if part.size > 1:
        # Padding stands at the end, where causal attention does not look; positions are those of the whole sequence.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        inputs = {"input_ids": part.cut(input_ids, 0), "position_ids": part.cut(positions, 0)}
        targets = part.cut(targets, IGNORED)
    output = model(**inputs, use_cache=False)
    logits, router = output.logits, _router_loss(output, labels, router_coefficient)
    learned = targets != IGNORED
    total = functional.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
    # A micro-batch with nothing to learn must still reach every parameter: ZeRO's ranks reduce in step.
    # One number of each sequence does, where a sum over all of them would overflow float16.
    whole = total if bool(learned.any()) else total + 0.0 * logits[:, :1, :1].float().sum()
    return whole + router, router


def _router_loss(output: Any, labels: torch.Tensor | None, coefficient: float | None) -> torch.Tensor:
    """The weighted balance loss, once for each learned token, or once without `labels`. Raises LauncherError."""
    if coefficient is None:
        return torch.zeros(())
    loss: torch.Tensor | None = getattr(output, "aux_loss", None)
    if loss is None:
        raise LauncherError("the plan adds the balance loss of the experts' routers, and the model returns none")
    times = 1 if labels is None else (labels[:, 1:] != IGNORED).sum()
    return coefficient * times * loss.float()
