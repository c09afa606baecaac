"""Compares the memory estimate of a plan with the memory that ranks use, on CPUs or GPUs.

For every row, two ranks load a Llama with random weights, build the DeepSpeed engine and do two updates, with the
launcher's own worker code and the plan of a job. Each rank first does all this with a tiny model, so that all libraries
are loaded; the measured value is the peak of anonymous resident memory after that, minus the memory before the model is
loaded. On CPUs each row is measured twice. *In use*: glibc returns every freed block at once; compared with the
estimate without its share for fragmentation. *Resident*: glibc with its default settings; compared with the whole
estimate. Neither contains the libraries. With --gpus the values are torch.cuda.max_memory_allocated and
max_memory_reserved.

Findings, on two shared CPU cores (in memory.json; a test compares the formulas with it):
- in use: the mean absolute error is 2.4% (mean error -0.6%, worst row +7%), without any fitted constant;
- resident: the estimate is 5.3% too low on average (mean absolute error 12%). With models of 100M parameters, glibc
  keeps 30% more than is in use, which is the share in the estimate; with smaller models it keeps more (1.3 to 1.8 times
  the memory in use at 5M), since their tensors are too small to be returned individually;
- ZeRO-1 to 3 also keep a float32 copy of float32 weights, and gradients pass through a bucket and a copy of it;
- with the JSON's defaults, ZeRO-3 keeps every weight of these models gathered, and before the logits a second time, in
  the buffer into which it was fetched. With a reuse distance of all, 80M and 0 elements, the 100M model takes 2,675,
  2,426 and 2,272 MiB if activations determine the peak (estimated: 2,643, 2,450 and 2,298), and the same if the update
  does.

    python benchmarks/memory.py [--only TEXT] [--json FILE] [--gpus N]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.plan.facts import ModelFacts
    from launcher.plan.schema import Plan

MIB = 1024**2
RANKS, UPDATES, ACCUMULATION = 2, 2, 2
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
HEADS, POSITIONS = 4, 2048
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODELS = {
    "tiny": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 32},
    "5M": {"hidden_size": 224, "num_hidden_layers": 6, "vocab_size": 4096, "intermediate_size": 608},
    "25M": {"hidden_size": 448, "num_hidden_layers": 8, "vocab_size": 8192, "intermediate_size": 1216},
    "100M": {"hidden_size": 768, "num_hidden_layers": 11, "vocab_size": 16384, "intermediate_size": 2048},
}


@dataclass(frozen=True)
class Row:
    """One measurement: a model, its ZeRO block, micro-batch size and sequence length."""

    model: str
    zero: dict[str, Any]
    micro: int = 2
    length: int = 128
    section: dict[str, Any] = field(default_factory=dict)
    learned: float = 1.0
    """The share of learned tokens."""

    @property
    def name(self) -> str:
        extras = [f"{key}={value}" for key, value in self.zero.items() if key != "stage"]
        extras += [f"{key}={value}" for key, value in self.section.items()]
        extras += [f"learned={self.learned:g}"] if self.learned < 1 else []
        words = [self.model, f"ZeRO-{self.zero['stage']}", f"{self.micro} x {self.length}", *extras]
        return " ".join(words).replace("stage3_", "").replace("{'device': 'cpu'}", "cpu")


OFFLOADED = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# The maximum reuse distance of a gathered weight that is kept: the default (all of these models), some, and none. The
# batch is large enough for activations and logits to exceed the update, so that kept weights show in the peak.
DISTANCES: tuple[dict[str, int], ...] = (
    {},
    {"stage3_max_reuse_distance": 80_000_000, "stage3_prefetch_bucket_size": 0},
    {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
)
ROWS = (
    *(Row(model, {"stage": stage}) for model in ("5M", "25M", "100M") for stage in range(4)),
    Row("25M", {"stage": 2}, micro=8, length=256),
    Row("25M", {"stage": 2}, micro=8, length=256, learned=0.25),
    Row("25M", {"stage": 2}, micro=8, length=256, section={"gradient_checkpointing": True}),
    Row("25M", {"stage": 3}, micro=8, length=256, section={"gradient_checkpointing": True}),
    *(
        Row(
            "25M", {"stage": stage}, micro=8, length=256, section={"gradient_checkpointing": True, "chunked_loss": True}
        )
        for stage in (2, 3)
    ),
    Row("100M", {"stage": 3}, micro=4, length=256, section={"chunked_loss": True}),
    Row("100M", {"stage": 2, "reduce_bucket_size": 5_000_000}),
    *(Row("100M", {"stage": 3, **distance}, micro=4, length=256) for distance in DISTANCES),
    Row("100M", {"stage": 2}, section={"dtype": "bfloat16"}),
    Row("100M", {"stage": 3}, section={"dtype": "bfloat16"}),
    Row("100M", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    Row("100M", OFFLOADED),
)


def make_model(name: str, folder: Path) -> None:
    """Saves a Llama with random weights under `folder`, once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model_folder = folder / name
    if not model_folder.exists():
        torch.manual_seed(0)
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig(**MODELS[name], **heads, max_position_embeddings=POSITIONS))
        assert model.num_parameters() == facts_of(name, folder).parameters
        model.save_pretrained(model_folder)


def facts_of(name: str, folder: Path) -> ModelFacts:
    """The facts of a model that `make_model` creates."""
    from launcher.plan.facts import ModelFacts

    hidden, layers, vocabulary, wide = (MODELS[name][key] for key in SHAPE)
    parameters = 2 * vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * wide + 2 * hidden) + hidden
    return ModelFacts(
        folder=str(folder / name),
        model_type="llama",
        parameters=parameters,
        trainable_parameters=parameters,
        embedding_parameters=2 * vocabulary * hidden,
        hidden_size=hidden,
        intermediate_size=wide,
        layers=layers,
        attention_heads=HEADS,
        vocab_size=vocabulary,
        max_positions=POSITIONS,
        tied_embeddings=False,
        stored_dtype="float32",
        supports_gradient_checkpointing=True,
        has_chat_template=False,
        chunked_loss=True,
    )


def plan_for(row: Row, folder: Path, gpus: int = 0) -> Plan:
    """The plan of a job with sequences of the row's length, on CPU ranks or on `gpus` GPUs."""
    from launcher.ds_config import from_mapping
    from launcher.job import validate_job
    from launcher.plan.facts import DataFacts, MachineFacts, SplitFacts
    from launcher.plan.inputs import plan_inputs
    from launcher.plan.resolve import resolve

    facts = facts_of(row.model, folder)
    sizes = {"train_micro_batch_size_per_gpu": row.micro, "gradient_accumulation_steps": ACCUMULATION}
    job = validate_job(
        {
            "name": "memory",
            "model": {"name_or_path": facts.folder, "chunked_loss": False, **row.section},
            "data": {"train": "none", "max_length": row.length},
            "train": {"max_steps": 10, **sizes},
            "schedule": {"shape": "linear", "peak_lr": 1e-6, "warmup": 1},
            "cluster": {"gpus_per_node": gpus} if gpus else {"gpus_per_node": 0, "processes_per_node": RANKS},
        }
    )
    counts = {"rows": 100, "sequences": 100, "longest": row.length, "cut": 0, "dropped": 0, "partly_learned": 0}
    tokens = 100 * row.length
    split = SplitFacts(folder="", tokens=tokens, targets=int(tokens * row.learned), **counts)
    data = DataFacts(fingerprint="", format="text", train=split, eval=None)
    host = {"cpus": 2, "memory_bytes": 2**36, "versions": {}}
    machine = MachineFacts(device="cpu", device_name="CPU", gpus=0, gpu_memory_bytes=0, bf16=False, **host)
    if gpus:
        machine = MachineFacts(device="cuda", device_name="", gpus=gpus, gpu_memory_bytes=2**36, bf16=True, **host)
    inputs = plan_inputs(job, from_mapping({"zero_optimization": row.zero}, "ds.json"), machine)
    return resolve(inputs, facts, data)


def updates(plan: Plan, learned: float) -> None:
    """Loads the plan's model, builds the engine and does updates on random tokens, like a training rank."""
    import torch

    from launcher.chunked_loss import LossLayer
    from launcher.worker.batches import IGNORED
    from launcher.worker.loss import summed_loss
    from launcher.worker.model import load_model, make_engine

    engine = make_engine(plan, load_model(plan))
    layer = LossLayer(engine.module) if plan.training.chunked_loss else None
    shape = (plan.train_micro_batch_size_per_gpu, plan.training.job.data.max_length)
    for _ in range(UPDATES * plan.gradient_accumulation_steps):
        tokens = torch.randint(plan.training.model.vocab_size, shape, device=engine.device)
        labels = torch.where(torch.rand(shape, device=engine.device) < learned, tokens, IGNORED)
        loss = summed_loss(engine, tokens, torch.ones_like(tokens), labels, layer=layer)
        engine.backward(loss / labels.numel())
        engine.step()
    engine.destroy()


def rank(small: Path, large: Path, learned: float) -> None:
    """One rank: first runs the small plan, then measures the large one.

    Prints bytes as JSON: on a CPU the peak of the process, on a GPU the peaks of allocated and reserved memory.
    """
    from launcher.plan.schema import Plan
    from launcher.worker.ranks import join_ranks

    plans = [Plan.from_json(path.read_text()) for path in (small, large)]
    ranks = join_ranks(plans[1])
    updates(plans[0], 1.0)
    gc.collect()
    ranks.barrier()
    peak = (peak_on_gpu if plans[1].world.device == "cuda" else peak_on_cpu)(plans[1], learned)
    print(json.dumps(peak), file=sys.__stdout__, flush=True)
    os._exit(0)


def peak_on_cpu(plan: Plan, learned: float) -> dict[str, int]:
    """The peak of the process's bytes above those before; glibc's settings determine whether freed blocks count."""
    before = resident_bytes()
    with sampled() as largest:
        updates(plan, learned)
    return {"peak": largest() - before}


def peak_on_gpu(plan: Plan, learned: float) -> dict[str, int]:
    """The peaks of the GPU's bytes above those allocated before: allocated, and reserved by PyTorch's allocator."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    updates(plan, learned)
    peaks = {"in_use": torch.cuda.max_memory_allocated(), "resident": torch.cuda.max_memory_reserved()}
    return {name: peak - before for name, peak in peaks.items()}


def resident_bytes() -> int:
    """The anonymous resident memory of this process, without libraries and mapped files."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def sampled() -> Iterator[Callable[[], int]]:
    """Samples the resident memory every two milliseconds; yields a function that returns the largest."""
    largest, ended = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not ended.is_set():
            largest[0] = max(largest[0], resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        yield lambda: largest[0]
    finally:
        ended.set()
        watcher.join()


def measure(row: Row, folder: Path, gpus: int = 0) -> dict[str, Any]:
    """A row's bytes in use and resident, of the rank with the larger values, and the parts of the estimate."""
    small = Row("tiny", row.zero, 1, 8, row.section)
    plans = {"small": plan_for(small, folder, gpus), "large": plan_for(row, folder, gpus)}
    make_model("tiny", folder)
    make_model(row.model, folder)
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(plan.to_json())
    if gpus:
        peak = largest_peak(row, folder, {}, gpus)
    else:
        runs = {"in_use": RETURN_FREED_BLOCKS, "resident": {}}
        peak = {name: largest_peak(row, folder, allocator)["peak"] for name, allocator in runs.items()}
    return {"row": row.name, **peak, "memory": plans["large"].training.memory}


def largest_peak(row: Row, folder: Path, allocator: dict[str, str], gpus: int = 0) -> dict[str, int]:
    """Runs all ranks at once; returns the largest bytes of any rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--rank", str(folder), str(row.learned)]
    processes = []
    for number in range(size := gpus or RANKS):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "MASTER_PORT": port}
        place |= {"DS_ACCELERATOR": "cuda"} if gpus else {}
        environment = {**os.environ, **ENVIRONMENT, **allocator, **place, "MASTER_ADDR": "127.0.0.1"}
        with (folder / f"rank-{number}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log))
    found = []
    for number, process in enumerate(processes):
        out = process.communicate(timeout=500)[0].decode()
        if process.returncode:
            raise SystemExit(f"{row.name}: {(folder / f'rank-{number}.log').read_text()[-3000:]}")
        found.append(json.loads(out.strip().splitlines()[-1]))
    return {name: max(rank[name] for rank in found) for name in found[0]}


def on_device(memory: dict[str, int]) -> int:
    """The part of the estimate that is measured; on a CPU (the only device with a base), with offloaded bytes."""
    return memory["device_total"] - memory["base"] + (memory["offloaded"] if memory["base"] else 0)


def errors_of(found: dict[str, Any]) -> tuple[float, float]:
    """The relative errors of the estimate, for the memory in use and the resident memory."""
    memory, whole = found["memory"], on_device(found["memory"])
    return (whole - memory["fragmentation"]) / found["in_use"] - 1, whole / found["resident"] - 1


def show(found: dict[str, Any]) -> None:
    """Prints a row."""
    memory, (in_use, resident) = found["memory"], errors_of(found)
    whole = on_device(memory)
    numbers = [(whole - memory["fragmentation"], found["in_use"], in_use), (whole, found["resident"], resident)]
    cells = "   ".join(f"{estimated / MIB:6.0f} {peak / MIB:6.0f} {error:+5.0%}" for estimated, peak, error in numbers)
    print(f"{found['row']:62} {cells}", flush=True)


def summarise(rows: list[dict[str, Any]]) -> None:
    """Prints the mean errors, and the ratio of resident memory to memory in use."""
    for words, errors in zip(("in use", "resident"), zip(*map(errors_of, rows), strict=True), strict=True):
        mean, size = fmean(errors), fmean(map(abs, errors))
        print(f"{words:9} mean error {mean:+.1%}, mean absolute error {size:.1%} over {len(rows)} rows")
    print(f"resident / in use: {fmean(row['resident'] / row['in_use'] for row in rows):.2f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Only rows whose name contains this text.")
    parser.add_argument("--json", type=Path, help="Write the measured values to this file.")
    parser.add_argument("--gpus", type=int, default=0, help="Run on this number of GPUs, in bfloat16.")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        folder = Path(arguments.rank[0])
        rank(folder / "small.json", folder / "large.json", float(arguments.rank[1]))
    os.environ.update(ENVIRONMENT)
    print(f"{'MiB per rank':62} {'in use: estimate, measured':24} {'resident: estimate, measured'}")
    with tempfile.TemporaryDirectory() as temporary:
        rows = [measure_and_show(row, Path(temporary), arguments.gpus) for row in ROWS if arguments.only in row.name]
    summarise(rows)
    if arguments.json:
        kept = [{name: row[name] for name in ("row", "in_use", "resident")} for row in rows]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


def measure_and_show(row: Row, folder: Path, gpus: int) -> dict[str, Any]:
    found = measure(row, folder, gpus)
    show(found)
    return found


if __name__ == "__main__":
    main()
