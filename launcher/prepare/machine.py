"""What a node has: devices by NVML, memory by psutil, versions by package metadata. Nothing heavy is imported."""

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
    """The node this process runs on. GPUs hidden by CUDA_VISIBLE_DEVICES do not count."""
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
    """Versions of the launcher and of what it stands on; 'missing' where one is not installed."""
    found = {"launcher": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def missing_packages(names: Iterable[str]) -> frozenset[str]:
    """Those of the packages that are not installed here."""
    return frozenset(name for name in names if not _installed(name))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _torch_has_cuda() -> bool:
    """A CPU build of torch (2.13.0+cpu) uses no GPU, whatever the machine has."""
    try:
        return not version("torch").endswith("+cpu") and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    except PackageNotFoundError:
        return False


def _visible_gpus() -> list[tuple[str, int, tuple[int, int]]]:
    """(name, bytes, compute capability) of each GPU that CUDA would show."""
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
    """(UUID, handle) of each GPU that may be opened: CUDA numbers those alone that a job's cgroup leaves it."""
    import pynvml

    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError_NoPermission):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            yield str(pynvml.nvmlDeviceGetUUID(handle)), handle


def _describe(handle: object) -> tuple[str, int, tuple[int, int]]:
    """Of a GPU, or of a slice of one (MIG), whose capability is that of the whole."""
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
    """What CUDA_VISIBLE_DEVICES leaves, which names GPUs by number or by the start of their UUID, and slices of them.

    As in CUDA, nothing counts from the first name on that means no device.
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
