"""Plain PyTorch, as torchrun's tutorial has it. On request it reports, or one rank raises."""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import launcher

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "LAUNCHER_DS_CONFIG"),
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--raise-on-rank", type=int)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    print({name: os.environ[name] for name in VARIABLES})
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    for step in range(args.steps):
        if rank == args.raise_on_rank and step == 3:
            raise RuntimeError("a worn-out example")
        given = torch.randn(16, 4)
        loss = torch.nn.functional.mse_loss(model(given), given.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)
        if args.report:
            launcher.report(step=step, loss=loss, lr=optimizer.param_groups[0]["lr"])
    weights = [torch.zeros(1, 4) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, model.module.weight.detach())
    print("the ranks agree" if torch.equal(*weights) else "the ranks differ")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
