"""This rank's place in the world, its process group, and small reductions."""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.plan.schema import Plan


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the world."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    host: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of ranks."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        dist.barrier()


def join_ranks(plan: Plan) -> Ranks:
    """Joins the process group, from torchrun's environment variables."""
    import deepspeed

    # DeepSpeed calls these on every gather; each call would add a line to the log.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    cuda, local_rank = plan.world.device == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        # Only inference uses this kernel, and building it takes most of a minute on a new machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        plan.world.backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=30)
    )
    return Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        host=socket.gethostname(),
    )
