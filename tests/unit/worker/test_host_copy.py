"""Copies of states in host memory: they save as the original does, and keep their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.worker.host_copy import HostMemory, host_copy

CPU = torch.device("cpu")


def saved(state: Any, folder: Path) -> bytes:
    """The file that torch.save writes. It contains the file's own name, so all have the same."""
    folder.mkdir()
    torch.save(state, folder / "state.pt")
    return (folder / "state.pt").read_bytes()


def marked(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with attributes, as DeepSpeed has them; some are tensors."""
    tensor.ds_id, tensor.ds_part = 7, tensor[:2]
    return tensor


def states() -> dict[str, Any]:
    flat = torch.arange(40.0)
    tied = torch.nn.Parameter(torch.ones(3, 2))
    return {
        "views of one tensor": {"flat": flat, "part": flat[5:25].view(4, 5), "turned": flat.view(8, 5).t()},
        "tied weights": {"in": tied, "out": tied, "detached": tied.detach()},
        "no elements": [torch.empty(0), torch.empty(0, 4), torch.nn.Parameter(torch.empty(0))],
        "types": [torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int64, torch.bool)],
        "a tensor that needs gradients": torch.ones(3, requires_grad=True),
        "a tensor with attributes": marked(torch.ones(4)),
        "a parameter with attributes": marked(torch.nn.Parameter(torch.ones(4))),
        "a string of torch.save": {"cpu": torch.ones(2), "storage": "cpu"},
        "no tensors": {
            "step": 4,
            "betas": (0.9, 0.99),
            "path": Path("a"),
            "dtype": torch.bfloat16,
            "shape": flat.shape,
        },
        "a part of a larger tensor": torch.ones(1000)[:3],
        "a module and a storage": [torch.nn.Linear(2, 2), torch.ones(3).untyped_storage()],
    }


@pytest.mark.parametrize("name", states())
def test_the_copy_is_saved_as_the_same_bytes(name: str, tmp_path: Path) -> None:
    state = states()[name]
    copy = host_copy(state, HostMemory(CPU)).state()
    assert saved(copy, tmp_path / "copy") == saved(state, tmp_path / "state")


def test_the_copy_keeps_its_values(tmp_path: Path) -> None:
    state = {"weight": torch.nn.Parameter(torch.ones(3)), "step": torch.tensor(4), "lr": [0.1]}
    before = saved(state, tmp_path / "before")
    copy = host_copy(state, HostMemory(CPU))
    state["weight"].data += 1
    state["step"] += 1
    state["lr"][0] = 0.2
    assert saved(copy.state(), tmp_path / "copy") == before


def test_buffers_that_were_given_back_are_used_again() -> None:
    memory = HostMemory(CPU)
    state = [torch.ones(5), torch.ones(7), torch.ones(5)]
    first = host_copy(state, memory)
    second = host_copy(state, memory)
    places = [{buffer.data_ptr() for buffer in copy.buffers} for copy in (first, second)]
    assert len(places[0] | places[1]) == 6
    memory.give_back(first.buffers)
    third = host_copy([torch.zeros(5), torch.zeros(7), torch.zeros(5), torch.zeros(9)], memory)
    assert places[0] < {buffer.data_ptr() for buffer in third.buffers}
    assert [tensor.sum() for tensor in third.state()] == [0, 0, 0, 0]
    assert [tensor.sum() for tensor in second.state()] == [5, 7, 5]
