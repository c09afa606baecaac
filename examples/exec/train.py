"""A plain DeepSpeed script, as in DeepSpeed's getting started guide; it also runs under torchrun and deepspeed.

The DeepSpeed JSON sets optimizer, learning rate, batch size and ZeRO stage. The only line for the launcher is
launcher.report, which is optional and does nothing outside a run of the launcher.
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
    # The JSON sets the precision: float32 on CPUs, bfloat16 or float16 on GPUs.
    dtype = next(engine.module.parameters()).dtype
    batches = iter(loader)
    for step in range(args.steps):
        given, wanted = (part.to(engine.device, dtype) for part in next(batches))
        loss = torch.nn.functional.mse_loss(engine(given), wanted)
        engine.backward(loss)
        lr = optimizer.param_groups[0]["lr"]  # read before engine.step(), which also steps the scheduler
        engine.step()
        launcher.report(step=step, loss=loss, lr=lr, grad_norm=engine.get_global_grad_norm())
    print(f"local rank {args.local_rank} of {engine.world_size}, micro-batch {len(given)}")


if __name__ == "__main__":
    main()
