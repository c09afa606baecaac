"""Multiplies matrices whose product is known exactly, which shows a device that computes wrongly or slowly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from launcher.errors import FailureCode, RunFailed

_TILE = 512
_REPEATS = {"cuda": 16, "cpu": 2}
"""How often the tile is repeated in each direction: large matrices keep all of a device busy."""
_BATCH = {"cuda": 10, "cpu": 1}
"""Products per measurement."""
_LARGEST = 2
"""Of the tile's entries, which are whole numbers: every sum is exact in float32, and below float16's maximum."""


@dataclass(frozen=True)
class Product:
    """TFLOP/s of a device, and how many elements of all products were wrong."""

    tflops: float
    wrong: int


def multiply(device: torch.device, seconds: float) -> Product:
    """Multiplies for about `seconds`, and compares each product with the known one.

    Both matrices repeat a tile m × m times, so that the product repeats m times the product of the tiles, which the
    CPUs compute in float64. All sums are exact in the accumulators, so the order of additions does not matter.
    """
    repeats, batch = _REPEATS[device.type], _BATCH[device.type]
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-_LARGEST, _LARGEST + 1, (_TILE, _TILE), generator=generator).double() for _ in range(2)
    )
    kind = _precision(device)
    expected = (repeats * (left @ right)).to(kind).to(device)
    large_left, large_right = (tile.to(kind).to(device).repeat(repeats, repeats) for tile in (left, right))
    size, wrong = _TILE * repeats, 0
    speeds: list[float] = []
    with _exact_sums():
        product = large_left @ large_right
        began = time.perf_counter()
        while not speeds or time.perf_counter() - began < seconds:
            _wait_for(device)
            started = time.perf_counter()
            for _ in range(batch):
                product = large_left @ large_right
            _wait_for(device)
            speeds.append(batch * 2 * size**3 / (time.perf_counter() - started) / 1e12)
            tiles = product.view(repeats, _TILE, repeats, _TILE)
            wrong += int((tiles != expected[:, None, :]).sum().item())
    # The first half only raises the clocks.
    return Product(median(speeds[len(speeds) // 2 :]), wrong)


def check_device(device: torch.device) -> None:
    """Raises RunFailed if the device multiplies wrongly. Takes about a tenth of a second on a GPU."""
    found = multiply(device, 0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if found.wrong:
        message = (
            f"{device} multiplies wrongly (wrong elements of a known product: {found.wrong}): do not train on it; it "
            "needs a repair"
        )
        raise RunFailed(message, code=FailureCode.NODE_FAULTY)


def _precision(device: torch.device) -> torch.dtype:
    """That of training on such a device."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _exact_sums() -> Iterator[None]:
    """Has CUDA add in float32, also where parts of a sum are added in the end."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
