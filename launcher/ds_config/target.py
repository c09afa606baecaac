"""Where a DeepSpeed JSON is to be used, as far as that decides whether DeepSpeed takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.ds_config.facts import Precision

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Target:
    """The device and number of the ranks, the packages that are known to be missing there, and whose loop trains.

    `world_size` and `dtype` are None where they are not known, and then not checked. `dtype` is the precision of the
    weights where the JSON leaves it open. `script`: a training script of the user's own, which can do what the
    launcher's loop does not.
    """

    device: Device
    world_size: int | None = None
    missing: frozenset[str] = frozenset()
    script: bool = False
    dtype: Precision | None = None
