"""Checks once, before training, that the loaded weights are finite."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import FailureCode, RunFailed
from launcher.worker.ranks import Ranks

_LEAST_BYTES = 2
"""One-byte types hold quantised weights, whose scales are other parameters."""


class NonFiniteWeightsError(RunFailed):
    """Loaded weights contain NaN or Inf."""

    code = FailureCode.NAN_WEIGHTS


def check_weights(model: Any, ranks: Ranks, folder: str, checkpoint: str | None = None) -> None:
    """Raises NonFiniteWeightsError on every rank if any loaded NaN or Inf; names the first parameter and its source.

    Frozen parameters come from the pretrained `folder`; trained ones from the checkpoint if one was loaded. Under
    ZeRO-3 each rank checks its own partition. Costs one pass over the weights and one small message per rank.
    """
    parameters = dict(model.named_parameters())
    found = [_is_finite(local_values(parameter)).to("cpu") for parameter in parameters.values()]
    own = [name for name, finite in zip(parameters, found, strict=True) if not finite]
    non_finite = {name for names in ranks.gather(own) for name in names}
    if not non_finite:
        return
    first = next(name for name in parameters if name in non_finite)
    origin = checkpoint if checkpoint is not None and parameters[first].requires_grad else folder
    raise NonFiniteWeightsError(
        f"the weights of {origin} contain NaN or Inf in {len(non_finite)} of {len(parameters)} parameters, first in "
        f"{_saved_name(first)}, as loaded in {str(parameters[first].dtype).removeprefix('torch.')}"
    )


def local_values(parameter: Any) -> Any:
    """This rank's values of a parameter: all of them, or under ZeRO-3 its partition without the padding at the end.

    The padding is never written. A partition that was offloaded to NVMe is empty here and is not checked.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    left = parameter.ds_numel - part.ds_numel * parameter.ds_zero_partition_rank
    return part.detach().flatten()[: max(0, left)]


def _is_finite(values: Any) -> Any:
    """A bool tensor on the device of the values: whether all are finite. The minimum or maximum shows NaN and Inf."""
    if values.numel() == 0 or not values.is_floating_point() or values.element_size() < _LEAST_BYTES:
        return torch.tensor(True)
    least, greatest = torch.aminmax(values)
    return torch.isfinite(least) & torch.isfinite(greatest)


def _saved_name(name: str) -> str:
    """The parameter's name in the saved model: without the prefixes that peft adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
