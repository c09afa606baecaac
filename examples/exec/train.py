"""A plain DeepSpeed script, as DeepSpeed's getting started guide has it: runs under torchrun and deepspeed as well.

Optimizer, learning rate, batch and ZeRO stage are those of the DeepSpeed JSON. The one line for the launcher, which is
optional and does nothing elsewhere, is launcher.report.
"""

import argparse

import deepspeed
import torch

import launcher


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="passed by the deepspeed launcher")
    parser.add_argument("--steps", type=int, required=True)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    inputs = torch.randn(1024, 8)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    engine, optimizer, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=data
    )
    # The precision is the JSON's: float32 on processors, bfloat16 or float16 on GPUs.
    dtype = next(engine.module.parameters()).dtype
    batches = iter(loader)
    for step in range(args.steps):
        given, wanted = (part.to(engine.device, dtype) for part in next(batches))
        loss = torch.nn.functional.mse_loss(engine(given), wanted)
        engine.backward(loss)
        rate = optimizer.param_groups[0]["lr"]  # before the step, which moves the schedule on
        engine.step()
        launcher.report(step=step, loss=loss, lr=rate, grad_norm=engine.get_global_grad_norm())
    print(f"local rank {args.local_rank} of {engine.world_size}, micro-batch {len(given)}")


if __name__ == "__main__":
    main()
