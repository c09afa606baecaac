"""A CPU that computes wrongly, as the process sees it that tries the devices of a node before ranks start."""

from __future__ import annotations

from pathlib import Path

_SITECUSTOMIZE = """
import socket
import sys

if "launcher.worker.health_probe" in sys.orig_argv and {host!r} in (None, socket.gethostname()):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Wrong(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            found = function(*arguments, **(options or {{}}))
            if function is torch.ops.aten.mm.default and found.dtype is torch.float32:
                found[5, 7] += 1
            return found

    Wrong().__enter__()
"""


def wrong_products(folder: Path, host: str | None = None) -> dict[str, str]:
    """Variables with which one element of every product in float32 is wrong, on one host or on all."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(host=host))
    return {"PYTHONPATH": str(folder)}
