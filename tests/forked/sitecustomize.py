"""Has a process whose PYTHONPATH has this folder start the launcher's Python modules as forks; see fork_client.py."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import fork_client


class _Patching(importlib.abc.MetaPathFinder):
    """Finds the modules that start processes, and replaces their `subprocess` once they are executed."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name not in fork_client.PATCHED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _patched(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _patched(execute: Any) -> Any:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        module.subprocess = fork_client.REPLACEMENT  # type: ignore[attr-defined]

    return exec_module


if fork_client.SERVER in os.environ:
    sys.meta_path.insert(0, _Patching())
