"""Where a DeepSpeed JSON runs, as far as lint needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.ds_config.facts import Precision

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Target:
    """The device and number of the ranks, the missing packages, and whether the user's own script trains.

    `world_size` and `dtype` are None if unknown, and then not checked. `dtype` is the precision of the weights if the
    JSON does not set it. `script`: the user's training script, which is not limited to the launcher's loop.
    """

    device: Device
    world_size: int | None = None
    missing: frozenset[str] = frozenset()
    script: bool = False
    dtype: Precision | None = None
