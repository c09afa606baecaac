"""Plain PyTorch, as torchrun's tutorial has it. On request it reports, or one rank raises and is long in ending."""

import argparse
import atexit
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import launcher

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "LAUNCHER_DS_CONFIG"),
)


def leave_after(process):
    """Lets go of the other ranks, and ends once that process of this node has ended."""
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(file.name))) as connection:
            connection.getpeername()  # not one that listens
            connection.shutdown(socket.SHUT_RDWR)
    while Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    os._exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--raise-on-rank", type=int)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--saved", type=Path, help="where the number of updates is kept, as a checkpoint would")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    print({name: os.environ[name] for name in VARIABLES})
    print(
        f"launched by torchelastic: {dist.is_torchelastic_launched()}, {os.environ['LAUNCHER_RESTART_COUNT']} restarts"
    )
    print(f"a secret of {len(os.environ.get('WANDB_API_KEY', ''))} characters")
    processes = [None] * dist.get_world_size()
    dist.all_gather_object(processes, os.getpid())
    begin = int(args.saved.read_text()) if args.saved and args.saved.exists() else 0
    dist.barrier()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    for step in range(begin, args.steps):
        if rank == args.raise_on_rank and step == 3:
            atexit.register(leave_after, processes[1 - rank])
            raise RuntimeError("a worn-out example")
        given = torch.randn(16, 4)
        loss = torch.nn.functional.mse_loss(model(given), given.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)
        if args.report:
            launcher.report(step=step, loss=loss, lr=optimizer.param_groups[0]["lr"])
        if args.saved and rank == 0 and step == args.steps // 2:
            args.saved.write_text(str(step + 1))
    weights = [torch.zeros(1, 4) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, model.module.weight.detach())
    print("the ranks agree" if torch.equal(*weights) else "the ranks differ")
    # In one of eighty runs PyTorch 2.13 aborts at exit while it frees DDP's gloo threads ("terminate called without an
    # active exception"). All ranks are done here, so end without that.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
