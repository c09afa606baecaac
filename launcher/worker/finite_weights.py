"""Whether the weights that a run begins with are numbers: looked at once, before anything is computed with them."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import FailureCode, RunFailed
from launcher.worker.ranks import Ranks

_LEAST_BYTES = 2
"""Types of one byte per number hold quantised weights, which are scaled by others."""


class UnsoundWeights(RunFailed):
    """Weights that were loaded hold NaN or Inf."""

    code = FailureCode.NAN_WEIGHTS


def check_weights(model: Any, ranks: Ranks, folder: str, checkpoint: str | None = None) -> None:
    """Raises UnsoundWeights on every rank if one loaded NaN or Inf, naming the first such parameter and its origin.

    Frozen parameters are those of the pretrained `folder`; trained ones are the checkpoint's if one was loaded. Under
    ZeRO-3 each rank looks at its own parts. One pass over the weights, and one small message per rank.
    """
    parameters = dict(model.named_parameters())
    found = [_is_sound(held_by_rank(parameter)).to("cpu") for parameter in parameters.values()]
    own = [name for name, sound in zip(parameters, found, strict=True) if not sound]
    unsound = {name for names in ranks.gather(own) for name in names}
    if not unsound:
        return
    first = next(name for name in parameters if name in unsound)
    origin = checkpoint if checkpoint is not None and parameters[first].requires_grad else folder
    raise UnsoundWeights(
        f"the weights of {origin} hold NaN or Inf in {len(unsound)} of {len(parameters)} parameters, first in "
        f"{_saved_name(first)}, as loaded in {str(parameters[first].dtype).removeprefix('torch.')}"
    )


def held_by_rank(parameter: Any) -> Any:
    """What this rank has of a parameter: all of it, or under ZeRO-3 its part without the padding at the end.

    The padding is never written. A part that was moved to NVMe is empty here, and is not looked at.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    left = parameter.ds_numel - part.ds_numel * parameter.ds_zero_partition_rank
    return part.detach().flatten()[: max(0, left)]


def _is_sound(values: Any) -> Any:
    """A bool on the values' device: are all of them finite? NaN and Inf come through to the least or greatest."""
    if values.numel() == 0 or not values.is_floating_point() or values.element_size() < _LEAST_BYTES:
        return torch.tensor(True)
    least, greatest = torch.aminmax(values)
    return torch.isfinite(least) & torch.isfinite(greatest)


def _saved_name(name: str) -> str:
    """The name under which a folder has the parameter: without what adapters are wrapped in."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
