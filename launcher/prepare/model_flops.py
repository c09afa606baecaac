"""The floating-point operations (FLOPs) of a model's forward pass, as torch counts them on a model without weights."""

from __future__ import annotations

from typing import Any

_LENGTHS = (128, 256)


def forward_flops(model: Any) -> tuple[float, float]:
    """(FLOPs per token, FLOPs per pair of tokens in a sequence) of a forward pass of `model` on the meta device.

    A sequence of n tokens takes n times the first and n * n times the second, the products of attention. A product of
    matrices of m x k and k x n counts as 2 * m * k * n, others as nothing; causal masks and sliding windows do not make
    it less. Both are 0 if the code of the model cannot be run without weights.
    """
    short, long = _LENGTHS
    try:
        counted_short, counted_long = _counted(model, short), _counted(model, long)
    except Exception:  # The model's code may need values, which there are none of.
        return 0.0, 0.0
    pairs = (counted_long / long - counted_short / short) / (long - short)
    # Without attention, what does not grow with the length makes the difference negative.
    pairs = max(0.0, pairs)
    return counted_short / short - pairs * short, pairs


def _counted(model: Any, length: int) -> int:
    """The FLOPs of one sequence of this length."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    # A mask of four dimensions is used as it is; others are compared with each other, which needs values.
    mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device="meta")
    options = {} if _without_attention(model) else {"attention_mask": mask, "position_ids": ids}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_product})
    dtypes = {parameter.dtype for parameter in model.parameters()}
    # The kernels of experts only take bfloat16.
    model.to(torch.bfloat16)
    try:
        with torch.no_grad(), counter:
            model(input_ids=ids, use_cache=False, **options)
    finally:
        if len(dtypes) == 1:
            model.to(dtypes.pop())
    return int(counter.get_total_flops())


def _grouped_product(tokens: Any, experts: Any, *_: Any, **__: Any) -> int:
    """The FLOPs of tokens [m, k] with the weights [experts, k, n] of one expert each, which torch does not count."""
    return int(2 * tokens[0] * tokens[1] * experts[-1])


def _without_attention(model: Any) -> bool:
    from launcher.prepare.model_sizes import attention_heads

    return not attention_heads(model.config.get_text_config())
