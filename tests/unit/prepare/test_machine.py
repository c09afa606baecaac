"""Which GPUs a node has, with a fake NVML."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from launcher.prepare import machine

GIB = 1024**3


class NVMLError(Exception):
    """Like pynvml's."""


class NVMLError_NoPermission(NVMLError):
    """Like pynvml's."""


GPUS = [SimpleNamespace(uuid=f"GPU-{index}a", name="H100", bytes=80 * GIB, of=None) for index in range(4)]
SLICE = SimpleNamespace(uuid="MIG-1", name="H100 MIG 1g.10gb", bytes=10 * GIB, of=GPUS[0])


def fake_nvml(denied: tuple[int, ...]) -> ModuleType:
    """A fake NVML with four GPUs and a MIG slice of the first; the job's cgroup denies some GPUs."""

    def by_index(index: int) -> SimpleNamespace:
        if index in denied:
            raise NVMLError_NoPermission
        return GPUS[index]

    def by_uuid(uuid: str) -> SimpleNamespace:
        if uuid != SLICE.uuid:
            raise NVMLError("Not Found")
        return SLICE

    def whole_of(handle: SimpleNamespace) -> SimpleNamespace:
        if handle.of is None:
            raise NVMLError("Invalid Argument")
        return handle.of

    def capability(handle: SimpleNamespace) -> tuple[int, int]:
        if handle.of is not None:
            raise NVMLError("Not Supported")
        return 9, 0

    module = ModuleType("pynvml")
    module.__dict__.update(
        NVMLError=NVMLError,
        NVMLError_NoPermission=NVMLError_NoPermission,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(GPUS),
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=whole_of,
        nvmlDeviceGetUUID=lambda handle: handle.uuid,
        nvmlDeviceGetName=lambda handle: handle.name,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=handle.bytes),
        nvmlDeviceGetCudaComputeCapability=capability,
    )
    return module


@pytest.mark.parametrize(
    ("denied", "visible", "gpus", "name"),
    [
        ((), None, 4, "H100"),
        ((), "2,0", 2, "H100"),
        ((), "GPU-3,GPU-1a", 2, "H100"),
        ((), "1,7,0", 1, "H100"),
        ((), "", 0, "CPU"),
        # Slurm with ConstrainDevices: allowed GPUs are numbered from 0.
        ((0, 3), None, 2, "H100"),
        ((0, 3), "0,1", 2, "H100"),
        ((0, 3), "2", 0, "CPU"),
        ((0, 1, 2, 3), None, 0, "CPU"),
        ((), "MIG-1", 1, "H100 MIG 1g.10gb"),
        ((), "MIG-gone", 0, "CPU"),
    ],
)
def test_gpus_that_cuda_can_see_are_counted(
    monkeypatch: pytest.MonkeyPatch, denied: tuple[int, ...], visible: str | None, gpus: int, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(denied))
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine.measure_machine()
    assert (found.gpus, found.device_name) == (gpus, name)
    assert found.gpu_memory_bytes == {0: 0, 1: 10 * GIB if "MIG" in name else 80 * GIB}.get(gpus, 80 * GIB)
    assert found.bf16 == bool(gpus)
