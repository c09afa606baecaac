"""A plain DeepSpeed script for torchrun or `deepspeed`, with which launch_overhead compares the launcher.

It trains as in a run's plan.json (model folder, tokenised data, DeepSpeed JSON, batches and their order, the loss
averaged over all learned tokens) and writes a metrics.jsonl in the same format, without importing the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import AutoModelForCausalLM

IGNORED = -100


class Data:
    """The sequences of a token store, and their order in training."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.offsets = np.fromfile(folder / "offsets.i64", dtype=np.int64)
        self.targets = np.fromfile(folder / "targets.i32", dtype=np.int32)
        self.tokens = np.memmap(folder / "tokens.i32", dtype=np.int32, mode="r")
        self.learned = np.memmap(folder / "learned.u8", dtype=np.uint8, mode="r")
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def samples(self, start: int, stop: int) -> list[int]:
        """The indices of the samples from start to stop in the endless sequence of epochs."""
        count = len(self.targets)
        return [int(self._order(at // count)[at % count]) for at in range(start, stop)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = np.random.RandomState([self.seed, epoch]).permutation(len(self.targets))
        return self._orders[epoch]

    def batch(self, samples: list[int]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, each [sequences, length], padded on the right."""
        longest = max(int(self.offsets[s + 1] - self.offsets[s]) for s in samples)
        shape = (len(samples), -(-longest // 8) * 8)
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for row, sample in enumerate(samples):
            span = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
            tokens, learned = self.tokens[span], self.learned[span]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = np.where(learned == 1, tokens, IGNORED)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def micro_batches(
    data: Data, plan: dict[str, Any], rank: int, world: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    """(update, this rank's samples, all samples of the update) for every micro-batch."""
    micro, accumulation = plan["train_micro_batch_size_per_gpu"], plan["gradient_accumulation_steps"]
    whole = world * micro * accumulation
    for update in range(plan["length"]["total_updates"]):
        samples = data.samples(update * whole, (update + 1) * whole)
        for step in range(accumulation):
            start = (step * world + rank) * micro
            yield update, samples[start : start + micro], samples


def summed_loss(engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed negative log-likelihood of the learned tokens."""
    labels = batch.pop("labels")[:, 1:]
    logits = engine(**batch, use_cache=False).logits[:, :-1]
    learned = labels != IGNORED
    return functional.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")


def make_engine(plan: dict[str, Any]) -> Any:
    """The pretrained model in a DeepSpeed engine, with its scheduler at the first update of the plan."""
    model = AutoModelForCausalLM.from_pretrained(plan["workload"]["model"]["folder"], dtype=torch.float32)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        config=plan["ds_config"],
        dist_init_required=False,
    )
    for _ in range(plan["learning_rate"]["advance"]):
        engine.lr_scheduler.step()
    return engine


def train(engine: Any, data: Data, plan: dict[str, Any], metrics: Path) -> None:
    """Runs all updates and writes a line to `metrics` for each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total, since = torch.zeros((), dtype=torch.float64), time.perf_counter()
    for update, mine, whole in micro_batches(data, plan, rank, world):
        targets = int(data.targets[whole].sum())
        loss = summed_loss(engine, data.batch(mine))
        engine.backward(loss * world * plan["gradient_accumulation_steps"] / targets)
        total += loss.detach()
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            continue
        dist.all_reduce(total)
        engine.step()
        now = time.perf_counter()
        if rank == 0:
            line = {"update": update, "loss": float(total) / targets, "step_seconds": now - since, "time": time.time()}
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        since = now
        total.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of the run to match")
    parser.add_argument("metrics", type=Path, help="path of the metrics.jsonl to write")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text())["plan"]
    # As in the launcher's ranks: this kernel is only for inference, and slow to load.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    seed = plan["workload"]["job"]["train"]["seed"]
    torch.manual_seed(seed)
    train(make_engine(plan), Data(Path(plan["workload"]["data"]["train"]["folder"]), seed), plan, options.metrics)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
