"""Has a process whose PYTHONPATH has this folder start the launcher's Python modules as forks; see fork_client.py.

It also keeps DeepSpeed from building a kernel that only inference uses: building takes a minute, and every process that
loads it leaves 69 MB in /dev/shm.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import fork_client

SAME_FOR_ALL_RANKS = True
"""Read by launcher.worker.fork_server: ranks may be forks of a process that this file has changed."""


def _start_forks(module: ModuleType) -> None:
    module.subprocess = fork_client.REPLACEMENT  # type: ignore[attr-defined]


def _build_no_kernel(module: ModuleType) -> None:
    module.build_shm_op = lambda: None  # type: ignore[attr-defined]


_PATCHES = {**dict.fromkeys(fork_client.PATCHED, _start_forks), "deepspeed.comm.torch": _build_no_kernel}


class _Patching(importlib.abc.MetaPathFinder):
    """Finds the modules to patch, and patches them once they are executed."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _patched(spec.loader.exec_module, _PATCHES[name])  # type: ignore[method-assign]
        return spec


def _patched(execute: Any, patch: Any) -> Any:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        patch(module)

    return exec_module


if fork_client.SERVER_VARIABLE in os.environ:
    sys.meta_path.insert(0, _Patching())
