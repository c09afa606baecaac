"""A known product: exact on a good device, and every wrong element is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.errors import RunFailed
from launcher.worker import matmul_check
from launcher.worker.health_probe import pair_rounds
from launcher.worker.matmul_check import check_device, multiply

CPU = torch.device("cpu")


class WrongElement(TorchDispatchMode):
    """A device that gets one element of every large product in float32 wrong, by the last bit or with a NaN."""

    def __init__(self, nan: bool) -> None:
        super().__init__()
        self.nan = nan

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        if function is torch.ops.aten.mm.default and found.dtype is torch.float32:
            value = found[700, 30]
            found[700, 30] = float("nan") if self.nan else torch.nextafter(value, torch.tensor(torch.inf))
        return found


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_good_device_gets_every_element_right() -> None:
    found = multiply(CPU, 0.0)
    assert found.wrong == 0 and found.tflops > 0
    check_device(CPU)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("nan", [False, True])
def test_one_wrong_element_is_found(nan: bool) -> None:
    with WrongElement(nan):
        assert multiply(CPU, 0.0).wrong == 1
        with pytest.raises(RunFailed, match="cpu multiplies wrongly") as raised:
            check_device(CPU)
    assert raised.value.code == "node_faulty"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sums_are_exact_in_float32_and_products_are_finite_in_half_precision(kind: torch.dtype) -> None:
    """The largest possible sums of a GPU's matrices."""
    size, largest = matmul_check._TILE * matmul_check._REPEATS["cuda"], matmul_check._LARGEST
    assert size * largest**2 < 2**24, "whole numbers below are exact in float32"
    assert torch.isfinite(torch.tensor(float(size * largest**2)).to(kind))


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_every_link_of_the_ring_is_measured_once_and_no_node_twice_at_a_time(nodes: int) -> None:
    rounds = pair_rounds(nodes)
    assert len(rounds) == (1 if nodes == 2 else 2 + nodes % 2)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    links = [frozenset(pair) for pairs in rounds for pair in pairs]
    ring = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)}
    assert len(links) == len(ring) and set(links) == ring
