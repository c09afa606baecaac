"""One process a node joins a group and reduces a small tensor, before anything expensive is begun.

`python -m launcher.worker.collective_check`, with torchrun's environment variables and LAUNCHER_BACKEND. It uses the
backend and the interface that the ranks will use.
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
    """Raises where the group cannot be joined, or the sum is wrong."""
    backend = os.environ["LAUNCHER_BACKEND"]
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, timeout=_TIMEOUT)
    size = dist.get_world_size()
    tensor = torch.full((_ELEMENTS,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(tensor)
    wanted = size * (size + 1) / 2
    if not torch.equal(tensor.cpu(), torch.full((_ELEMENTS,), wanted)):
        raise RuntimeError(f"the sum over {size} nodes is {tensor[0].item()}, and should be {wanted}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # The first line says it; NCCL and gloo put stack traces behind.
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
