"""An accelerate loop after accelerate's example for DeepSpeed configuration files."""

import argparse
import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DummyOptim, DummyScheduler


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, required=True)
    parser.add_argument("--max_train_steps", type=int, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        # On processors accelerate starts a process group only when told so, and DeepSpeed then takes it.
        PartialState(cpu=True)
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    inputs = torch.randn(256, 8)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, batch_size=args.per_device_train_batch_size)

    # The configuration file brings an optimizer and a scheduler, or the script does.
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config if plugin is not None else {}
    optimizer_class = DummyOptim if "optimizer" in config else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=args.learning_rate)
    if "scheduler" in config:
        scheduler = DummyScheduler(optimizer, total_num_steps=args.max_train_steps)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    accelerator.print(f"prepared: {accelerator.distributed_type.value}, {accelerator.num_processes} processes")
    for step, (given, wanted) in enumerate(loader):
        if step == args.max_train_steps:
            break
        rate = optimizer.param_groups[0]["lr"]
        loss = torch.nn.functional.mse_loss(model(given), wanted)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step} lr {rate!r} loss {loss.item()!r}")
    # PyTorch 2.13 sometimes aborts at exit while it frees gloo's threads. All ranks are done here, so end without that.
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
