"""A node's devices (from NVML), memory (psutil) and package versions. No heavy imports."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import psutil

from launcher.plan.facts import MachineFacts
from launcher.version import __version__

_PACKAGES = (
    *("torch", "deepspeed", "transformers", "datasets", "ray", "peft", "liger-kernel", "triton"),
    *("flash-attn", "flash-attn-3", "kernels"),
)


def measure_machine() -> MachineFacts:
    """The facts of this node. GPUs hidden by CUDA_VISIBLE_DEVICES do not count."""
    gpus = _visible_gpus() if _torch_has_cuda() else []
    name, memory, capability = gpus[0] if gpus else ("CPU", 0, (0, 0))
    return MachineFacts(
        device="cuda" if gpus else "cpu",
        device_name=name,
        gpus=len(gpus),
        gpu_memory_bytes=memory,
        bf16=capability >= (8, 0),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        versions=installed_versions(),
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None),
    )


def installed_versions() -> dict[str, str]:
    """Versions of the launcher and its main dependencies; 'missing' if one is not installed."""
    found = {"launcher": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def missing_packages(names: Iterable[str]) -> frozenset[str]:
    """The packages in `names` that are not installed here."""
    return frozenset(name for name in names if not _installed(name))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _torch_has_cuda() -> bool:
    """Whether torch can use GPUs: a CPU build (2.13.0+cpu) cannot."""
    try:
        return not version("torch").endswith("+cpu") and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    except PackageNotFoundError:
        return False


def _visible_gpus() -> list[tuple[str, int, tuple[int, int]]]:
    """(name, bytes, compute capability) of each GPU that CUDA can see."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        devices = dict(_devices())
        return [_describe(handle) for handle in _shown(devices)]
    finally:
        pynvml.nvmlShutdown()


def _devices() -> Iterator[tuple[str, object]]:
    """(UUID, handle) of each accessible GPU: CUDA numbers only those that the job's cgroup allows."""
    import pynvml

    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError_NoPermission):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            yield str(pynvml.nvmlDeviceGetUUID(handle)), handle


def _describe(handle: object) -> tuple[str, int, tuple[int, int]]:
    """The facts of a GPU or of a MIG slice; a slice has the capability of its GPU."""
    import pynvml

    whole = handle
    with contextlib.suppress(pynvml.NVMLError):
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(whole)
    return (
        str(pynvml.nvmlDeviceGetName(handle)),
        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        (major, minor),
    )


def _shown(devices: Mapping[str, object]) -> list[object]:
    """The devices in CUDA_VISIBLE_DEVICES, which names GPUs by number or UUID prefix, and MIG slices by UUID.

    As in CUDA, the first unknown name ends the list.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(devices.values())
    shown = []
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        found = _slice(entry) if entry.startswith("MIG-") else _whole(entry, devices)
        if found is None:
            break
        shown.append(found)
    return shown


def _whole(entry: str, devices: Mapping[str, object]) -> object | None:
    if entry.isdigit():
        return dict(enumerate(devices.values())).get(int(entry))
    return next((handle for uuid, handle in devices.items() if uuid.startswith(entry)), None)


def _slice(uuid: str) -> object | None:
    import pynvml

    try:
        handle: object = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None
    return handle
