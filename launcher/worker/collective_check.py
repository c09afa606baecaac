"""A small all-reduce with one process per node, before the ranks start.

`python -m launcher.worker.collective_check`, with torchrun's environment variables and LAUNCHER_BACKEND. It uses the
same backend and network interface as the ranks.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

_ELEMENTS = 1024
_TIMEOUT = timedelta(seconds=120)


def main() -> None:
    """Raises if the process group cannot be joined or the sum is wrong."""
    backend = os.environ["LAUNCHER_BACKEND"]
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, timeout=_TIMEOUT)
    size = dist.get_world_size()
    tensor = torch.full((_ELEMENTS,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(tensor)
    expected = size * (size + 1) / 2
    if not torch.equal(tensor.cpu(), torch.full((_ELEMENTS,), expected)):
        raise RuntimeError(f"the sum over {size} nodes is {tensor[0].item()}, expected {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Only the first line: NCCL and gloo append stack traces.
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
