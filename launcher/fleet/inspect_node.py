"""Inspects one node before its ranks start: versions, devices and the run directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.fleet.shared_memory import free_space
from launcher.plan.packages import MONITORS_AND_OPTIMIZERS
from launcher.prepare.machine import installed_versions, measure_machine, missing_packages
from launcher.run_dir import RunDir

# A network file system may report for some seconds that a file is missing, once it was asked too early.
_APPEAR_SECONDS = 10.0


@dataclass(frozen=True)
class NodeFacts:
    """A node's versions, devices and free disk space. `unwritable` is why it cannot write to the run directory.

    `missing`: the packages that a DeepSpeed JSON can need and that are not installed.
    `shm_bytes`: the size of /dev/shm; 0 if unknown.
    """

    versions: dict[str, str]
    gpus: int
    gpu_name: str
    free_bytes: int
    unwritable: str | None
    nvcc: bool = True
    missing: frozenset[str] = frozenset()
    shm_free_bytes: int = 0
    shm_bytes: int = 0


def node_facts(run_dir: str, mark: str) -> NodeFacts:
    """This node's facts. Writes the file `mark` to the run directory, for the other nodes to find."""
    machine = measure_machine()
    unwritable, free = None, 0
    try:
        (RunDir(Path(run_dir)).marks / mark).write_text(mark)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        unwritable = f"{type(error).__name__}: {error.strerror or error}"
    missing = missing_packages(MONITORS_AND_OPTIMIZERS)
    return NodeFacts(
        installed_versions(), machine.gpus, machine.device_name, free, unwritable, _has_nvcc(), missing, *free_space()
    )


def _has_nvcc() -> bool:
    """Whether DeepSpeed finds a CUDA compiler, which torch looks for in these places."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return bool(shutil.which("nvcc")) or any((Path(home) / "bin" / "nvcc").exists() for home in homes if home)


def missing_marks(run_dir: str, marks: Sequence[str]) -> list[str]:
    """Those of the marks that are not in the run directory as this node sees it."""
    folder, deadline = RunDir(Path(run_dir)).marks, time.monotonic() + _APPEAR_SECONDS
    missing = list(marks)
    while True:
        missing = [mark for mark in missing if not (folder / mark).is_file()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)
