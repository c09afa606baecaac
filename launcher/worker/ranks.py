"""This rank's place in the world, its process group, and small reductions."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.fleet.environment import PORT_VARIABLE
from launcher.plan.schema import Plan

_RENDEZVOUS = "launcher"


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


def rendezvous_method() -> str | None:
    """The init_method with which the first rank listens at the socket that its agent gave it; None for torch's own.

    The agent bound MASTER_PORT before any rank was started, so no other program can take it.
    """
    fd = os.environ.pop(PORT_VARIABLE, None)
    if fd is None:
        return None

    # Its types do not list what it exports.
    distributed: Any = dist

    def rendezvous(_url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=int(fd),
        )
        yield store, rank, world_size

    distributed.register_rendezvous_handler(_RENDEZVOUS, rendezvous)
    return f"{_RENDEZVOUS}://"


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
        plan.world.backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=30),
        init_method=rendezvous_method(),
    )
    return Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        host=socket.gethostname(),
    )
