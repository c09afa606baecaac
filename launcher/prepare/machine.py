"""What a node has: devices by NVML, memory by psutil, versions by package metadata. Nothing heavy is imported."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version

import psutil

from launcher import __version__
from launcher.plan.facts import MachineFacts

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "ray", "peft", "liger-kernel", "triton")


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
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        ids = [f"{pynvml.nvmlDeviceGetUUID(handle)}" for handle in handles]
        return [_describe(handles[i]) for i in _shown(ids)]
    finally:
        pynvml.nvmlShutdown()


def _describe(handle: object) -> tuple[str, int, tuple[int, int]]:
    import pynvml

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return (
        str(pynvml.nvmlDeviceGetName(handle)),
        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        (major, minor),
    )


def _shown(ids: list[str]) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES leaves, which names GPUs by number or by the start of their UUID."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(range(len(ids)))
    shown: list[int] = []
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        match = [int(entry)] if entry.isdigit() else [i for i, uuid in enumerate(ids) if uuid.startswith(entry)]
        if not match or match[0] >= len(ids):
            break
        shown.append(match[0])
    return shown
