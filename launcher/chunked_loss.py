"""The summed cross entropy of a model's learned tokens, without the logits of all tokens in memory at once.

The output layer is called as always, but its `forward` returns the loss instead of logits: for a chunk of learned
tokens at a time it computes the logits, their loss and the gradients. Liger-kernel's fused loss does the same on GPUs.
Under ZeRO-3, DeepSpeed's hooks gather the layer's weight as usual, since the module itself is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from launcher.plan.loss_memory import chunk_tokens


class LossLayer:
    """A model's output layer, which can compute the loss of the learned tokens instead of logits.

    Only for models that return the outputs of the layer as logits, without a factor or a cap; `fits` checks the
    layer, and the probe of a small model (`launcher.prepare.small_model_probe`) the rest.
    """

    def __init__(self, model: Any) -> None:
        self._layer = model.get_output_embeddings()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the output layer is a linear layer and not, for example, one with an adapter."""
        return type(model.get_output_embeddings()) is torch.nn.Linear

    @contextlib.contextmanager
    def computing_loss(self, targets: torch.Tensor, learned: torch.Tensor) -> Iterator[None]:
        """Inside the block, the model's logits are the summed loss (nats, float32), with shape [1, 1, 1].

        `targets` are token ids and `learned` the mask of those that count, both [sequences, length].
        """
        layer = self._layer

        def loss_instead_of_logits(hidden: torch.Tensor) -> torch.Tensor:
            # Inside a Function, autograd reports the weights' gradients as needed even under no_grad.
            gradients = torch.is_grad_enabled()
            loss: torch.Tensor = _chunked(hidden[learned], layer.weight, layer.bias, targets[learned], gradients)
            return loss.reshape(1, 1, 1)

        layer.forward = loss_instead_of_logits
        try:
            yield
        finally:
            del layer.forward


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T + bias`: inputs [tokens, hidden], [vocabulary, hidden], [vocabulary].

    The gradients are computed in the forward pass, from logits that are in memory there, and multiplied by the gradient
    of the loss in the backward pass. Those of the weight and bias are summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        gradients: bool,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad if gradients else (False,) * 3
        total = hidden.new_zeros((), dtype=torch.float32)
        for_hidden = torch.zeros_like(hidden) if wanted[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        size = chunk_tokens(weight.shape[0])
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = functional.linear(hidden[part], weight, bias).float()
            total += _loss_and_gradient(logits, targets[part])
            gradient = logits.to(hidden.dtype)
            if for_hidden is not None:
                torch.mm(gradient, weight, out=for_hidden[part])
            if for_weight is not None:
                _add_product(for_weight, gradient, hidden[part])
            if for_bias is not None:
                for_bias += logits.sum(0)
        ctx.save_for_backward(
            for_hidden,
            for_weight if for_weight is None else for_weight.to(weight.dtype),
            for_bias if for_bias is None or bias is None else for_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Saved tensors belong to this node alone, so they can be scaled in place.
        return *(None if each is None else each.mul_(gradients[0]) for each in ctx.saved_tensors), None, None


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross entropy of float32 `logits` [tokens, vocabulary], which become its gradient in place."""
    logits -= logits.amax(dim=1, keepdim=True)
    rows = torch.arange(len(targets), device=targets.device)
    chosen = logits[rows, targets]
    sums = logits.exp_().sum(dim=1)
    logits /= sums[:, None]
    logits[rows, targets] -= 1
    return (sums.log() - chosen).sum()


def _add_product(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Adds gradient.T @ hidden to a float32 `total`."""
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden


_chunked: Any = _ChunkedLoss.apply
