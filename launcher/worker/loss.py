"""The loss of a causal language model over its learned tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from launcher.chunked_loss import LossLayer
from launcher.document_attention import document_inputs
from launcher.errors import LauncherError
from launcher.worker.batches import IGNORED
from launcher.worker.ulysses import WHOLE, SequencePart


def summed_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    fused: bool = False,
    part: SequencePart = WHOLE,
    layer: LossLayer | None = None,
    packed: Sequence[int] = (),
) -> torch.Tensor:
    """The summed negative log-likelihood (nats, float32, a scalar) of the learned tokens of a micro-batch.

    The same as the loss of `summed_losses` without a router coefficient.
    """
    options: Any = {"fused": fused, "part": part, "layer": layer, "packed": packed}
    return summed_losses(model, input_ids, attention_mask, labels, **options)[0]


def summed_losses(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    fused: bool = False,
    part: SequencePart = WHOLE,
    router_coefficient: float | None = None,
    layer: LossLayer | None = None,
    packed: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the training loss of a micro-batch, the part of it that balances the experts' routers): both scalars.

    The loss is the summed negative log-likelihood (nats, float32) of the learned tokens. With `router_coefficient`, the
    model's balance loss is added, times the coefficient and the number of learned tokens. Divided by the learned tokens
    of the update, it is the mean over micro-batches weighted by their learned tokens; for a single micro-batch it
    equals transformers' own loss.

    All tensors are [sequences, length]. Only the logits of learned tokens are cast to float32. With `fused` the model
    computes the loss, as liger-kernel does without materialising logits. With `layer`, the model's output layer
    computes it for a chunk of learned tokens at a time. If several ranks share a sequence, the sum is over this rank's
    `part`. If the tensors are a row of packed sequences, `packed` are the lengths of these.
    """
    if fused:
        # With num_items_in_batch=1, the losses of transformers and liger-kernel are sums.
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        output = model(**batch, use_cache=False, num_items_in_batch=1)
        total: torch.Tensor = output.loss
        router = _router_loss(output, labels, router_coefficient)
        # The model has already added its balance loss once.
        return total + router - _router_loss(output, None, router_coefficient), router
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if packed:
        inputs = {"input_ids": input_ids, **document_inputs(packed, input_ids.device)}
    if part.size > 1:
        # Padding is at the end, where causal attention does not look; positions count along the whole sequence.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        inputs = {"input_ids": part.cut(input_ids, 0), "position_ids": part.cut(positions, 0)}
        targets = part.cut(targets, IGNORED)
    learned = targets != IGNORED
    if layer is not None:
        with layer.computing_loss(targets, learned):
            output = model(**inputs, use_cache=False)
        router = _router_loss(output, labels, router_coefficient)
        return output.logits.sum() + router, router
    output = model(**inputs, use_cache=False)
    logits, router = output.logits, _router_loss(output, labels, router_coefficient)
    total = functional.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
    # A micro-batch without learned tokens must still reach every parameter: ZeRO's ranks reduce together.
    # One logit per sequence is enough; the sum of all could overflow float16.
    whole = total if bool(learned.any()) else total + 0.0 * logits[:, :1, :1].float().sum()
    return whole + router, router


def _router_loss(output: Any, labels: torch.Tensor | None, coefficient: float | None) -> torch.Tensor:
    """The weighted balance loss, times the learned tokens of `labels` (once without labels). Raises LauncherError."""
    if coefficient is None:
        return torch.zeros(())
    loss: torch.Tensor | None = getattr(output, "aux_loss", None)
    if loss is None:
        raise LauncherError("the plan adds the balance loss of the experts' routers, but the model returns none")
    times = 1 if labels is None else (labels[:, 1:] != IGNORED).sum()
    return coefficient * times * loss.float()
