"""One process per node, before the ranks start: a matmul on each of its devices, and the network to the other nodes.

`python -m launcher.worker.health_probe`, with torchrun's environment variables for a rank per node, LAUNCHER_BACKEND,
LAUNCHER_DEVICE and LAUNCHER_HEALTH_CHECKS (off, auto or full). It uses the backend and network interface of the ranks.
Its figures are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.fleet.heartbeat import visible_gpus
from launcher.fleet.inspect_health import FIGURES
from launcher.worker.matmul_check import multiply

_ELEMENTS = 1024
_TIMEOUT = timedelta(seconds=120)
_MATMUL_SECONDS = {"auto": 0.2, "full": 3.0}
_FLOATS_PER_MIB = 2**18
_SIZES_MIB = {"auto": (1, 4, 16, 64), "full": (1, 4, 16, 64, 256)}
_ENOUGH_SECONDS = 0.2
"""An all-reduce that takes as long as this is the last one of its link."""


def main() -> None:
    """Raises if the process group cannot be joined or a sum is wrong. A device that fails is a figure."""
    checks, size = os.environ["LAUNCHER_HEALTH_CHECKS"], int(os.environ["WORLD_SIZE"])
    if checks != "off":
        _multiply_on_devices(_MATMUL_SECONDS[checks])
    if size > 1:
        backend = os.environ["LAUNCHER_BACKEND"]
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=_TIMEOUT)
        _check_sum(device)
        if checks != "off":
            _measure_links(device, _SIZES_MIB[checks])
        dist.destroy_process_group()


def pair_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """The neighbours on a ring of nodes, in rounds in which each node is in at most one pair."""
    if nodes == 2:
        return [[(0, 1)]]
    pairs = [(node, (node + 1) % nodes) for node in range(nodes)]
    last = [pairs.pop()] if nodes % 2 else []
    return [each for each in (pairs[0::2], pairs[1::2], last) if each]


def _multiply_on_devices(seconds: float) -> None:
    if os.environ["LAUNCHER_DEVICE"] == "cpu":
        _print("matmul", _multiplied("CPU", "CPU", torch.device("cpu"), seconds))
        return
    names = visible_gpus()
    for index in range(torch.cuda.device_count()):
        label = f"GPU {names[index] if index < len(names) else index}"
        _print("matmul", _multiplied(label, "", torch.device("cuda", index), seconds))


def _multiplied(label: str, name: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """The figures of one device: a `fleet.health.Matmul`."""
    try:
        found = multiply(device, seconds)
        name = name or torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        return {"device": label, "name": name, "error": _first_line(error)}
    return {"device": label, "name": name, "tflops": found.tflops, "wrong": found.wrong}


def _check_sum(device: torch.device) -> None:
    size = dist.get_world_size()
    tensor = torch.full((_ELEMENTS,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(tensor)
    expected = size * (size + 1) / 2
    if not torch.equal(tensor.cpu(), torch.full((_ELEMENTS,), expected)):
        raise RuntimeError(f"the sum over {size} nodes is {tensor[0].item()}, expected {expected}")


def _measure_links(device: torch.device, sizes_mib: tuple[int, ...]) -> None:
    """Prints the bandwidth to both neighbours on a ring of the nodes, one after the other, and that of all nodes."""
    size, own = dist.get_world_size(), dist.get_rank()
    for pairs in pair_rounds(size):
        # All pairs of a round at the same time: they share switches, as in training.
        _slowest(0.0, device)
        for peer in (sum(pair) - own for pair in pairs if own in pair):
            _print("link", peer, bytes_per_second=_link_bandwidth(peer, device, sizes_mib))
    if size > 2:
        _print("ring", _ring_bandwidth(device, sizes_mib))


def _link_bandwidth(peer: int, device: torch.device, sizes_mib: tuple[int, ...]) -> float:
    """Bytes per second in each direction while two nodes send to each other, from the largest size that is quick.

    That is also the bus bandwidth of an all-reduce of the two.
    """
    clock = torch.zeros(1, device=device)
    _exchange(clock, peer)  # connects
    found = 0.0
    for mib in sizes_mib:
        tensor = torch.zeros(mib * _FLOATS_PER_MIB, device=device)
        _exchange(clock, peer)  # starts together
        _wait_for(device)
        began = time.perf_counter()
        _exchange(tensor, peer)
        _wait_for(device)
        lasted = time.perf_counter() - began
        seconds = max(lasted, float(_exchange(torch.full_like(clock, lasted), peer).item()))
        found = 4 * tensor.numel() / seconds
        if seconds > _ENOUGH_SECONDS:
            break
    return found


def _exchange(tensor: torch.Tensor, peer: int) -> torch.Tensor:
    """The peer's tensor of the same size."""
    received = torch.empty_like(tensor)
    pair = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
    for request in dist.batch_isend_irecv(pair):
        request.wait()
    return received


def _ring_bandwidth(device: torch.device, sizes_mib: tuple[int, ...]) -> float:
    """The bus bandwidth of an all-reduce of all nodes in bytes per second, from the largest size that is quick.

    It is 2 (n - 1) / n times the bytes per second of n nodes, as in NVIDIA's nccl-tests.
    """
    size, found = dist.get_world_size(), 0.0
    for mib in sizes_mib:
        tensor = torch.zeros(mib * _FLOATS_PER_MIB, device=device)
        _slowest(0.0, device)  # starts together
        began = time.perf_counter()
        dist.all_reduce(tensor)
        _wait_for(device)
        seconds = _slowest(time.perf_counter() - began, device)
        found = 2 * (size - 1) / size * 4 * tensor.numel() / seconds
        if seconds > _ENOUGH_SECONDS:
            break
    return found


def _slowest(seconds: float, device: torch.device) -> float:
    """The maximum over all nodes. Waits for them."""
    tensor = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(kind: str, value: Any, **further: Any) -> None:
    # With a line end before it: output of NCCL may have none.
    print(f"\n{FIGURES}{json.dumps({kind: value, **further})}", flush=True)


def _first_line(error: BaseException) -> str:
    """NCCL and gloo append stack traces."""
    return (str(error).strip() or "no message").splitlines()[0]


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {_first_line(error)}")
