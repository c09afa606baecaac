"""Our presets, completed as a plan completes them, in the real DeepSpeed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.ds_config import Decisions, compose, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.lint import lint
from launcher.ds_config.read import parse_ds_config

pytestmark = pytest.mark.local

PRESETS = Path(__file__).parents[2] / "ds_configs"
ON_CPU = ("zero1", "zero2", "zero3", "zero3_cpu_offload")
ALL = sorted(path.stem for path in PRESETS.glob("*.json"))

TRAIN = """
import json, sys
import torch, deepspeed
config = json.load(open(sys.argv[1]))
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
engine, *_, scheduler = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
inputs = torch.randn(2, 16).to(next(engine.module.parameters()).dtype)
losses = []
for _ in range(12):
    loss = engine(inputs).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
print(json.dumps({
    "stage": engine.zero_optimization_stage(),
    "losses": losses,
    "updates": engine.global_steps,
    "clip": engine.gradient_clipping(),
    "scheduler": type(scheduler).__name__,
    "micro": engine.train_micro_batch_size_per_gpu(),
}))
"""
PARSE = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig
parsed = DeepSpeedConfig(sys.argv[1])
zero = parsed.zero_config
print(json.dumps({
    "stage": zero.stage,
    "hpz": zero.zero_hpz_partition_size,
    "quantized": [zero.zero_quantized_weights, zero.zero_quantized_gradients],
    "nvme": [str(block and block.nvme_path) for block in (zero.offload_param, zero.offload_optimizer)],
    "buckets": [zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold],
    "bf16": parsed.bfloat16_config.enabled,
    "batch": parsed.train_batch_size,
}))
"""


def completed(preset: str, device: Any) -> dict[str, Any]:
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 50,
            "warmup_num_steps": 2,
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 1e-2,
            "warmup_type": "linear",
        },
    }
    optimizer = {
        "type": "AdamW",
        "params": {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0},
    }
    precision: Any = "fp32" if device == "cpu" else "bf16"
    accumulation = 2 if device == "cpu" else 1
    decisions = Decisions(2 * accumulation, 2, accumulation, precision, device, optimizer, scheduler, 1.0, 64)
    return compose(read_ds_config(PRESETS / f"{preset}.json"), decisions).config


def start(script: str, config: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "ds_config.json"
    file.write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    env = {**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def run_script(script: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    done = start(script, config, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@pytest.mark.parametrize("preset", ON_CPU)
def test_presets_train_on_a_cpu(preset: str, tmp_path: Path) -> None:
    result = run_script(TRAIN, completed(preset, "cpu"), tmp_path)
    assert result["stage"] == int(preset[4])
    assert result["updates"] == 6
    assert result["losses"][-1] < result["losses"][0]
    assert (result["clip"], result["scheduler"], result["micro"]) == (1.0, "WarmupDecayLR", 2)


@pytest.mark.parametrize("preset", ALL)
def test_presets_are_parsed_as_written(preset: str, tmp_path: Path) -> None:
    result = run_script(PARSE, completed(preset, "cuda"), tmp_path)
    assert result["stage"] == int(preset[4])
    assert (result["bf16"], result["batch"]) == (True, 2)
    many, nvme = preset == "zero3_many_nodes", preset == "zero3_nvme_offload"
    assert (result["hpz"], result["quantized"]) == ((8, [True, True]) if many else (1, [False, False]))
    assert result["nvme"] == (["/local_nvme", "/local_nvme"] if nvme else result["nvme"])
    if result["stage"] == 3:
        assert result["buckets"] == [4096, 3686, 640]


def test_offload_presets_offload() -> None:
    config = completed("zero3_cpu_offload", "cuda")["zero_optimization"]
    assert (config["offload_param"]["device"], config["offload_optimizer"]["device"]) == ("cpu", "cpu")


# Wrong in one way each; lint must find an error in what DeepSpeed fails on, and none in what it takes.
VERDICTS = [
    ({}, True),
    ({"zero_optimization": {"stage": "2"}}, True),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, True),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, True),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "1e6"}}, False),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, False),
    ({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, False),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, False),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, False),
    ({"gradient_clipping": "1.0"}, False),
    ({"amp": {"enabled": True}}, False),
    ({"communication_data_type": "float32"}, False),
    ({"train_batch_size": 6}, False),
    ({"optimizer": {"type": "SGD", "params": {"lr": 1e-5}}}, False),
    ({"optimizer": {"type": "sgd", "params": {"lr": 1e-5}}}, False),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-5", "torch_adam": True}}}, False),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0, "warmup_type": "linear"}}}, False),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": 2}}}, False),
    ({"scheduler": {"type": "WarmupLR"}}, False),
]


@pytest.mark.parametrize(("changed", "accepted"), VERDICTS, ids=[json.dumps(case[0])[:60] for case in VERDICTS])
def test_lint_judges_as_deepspeed_does(changed: dict[str, Any], accepted: bool, tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    } | changed
    found = lint(parse_ds_config(json.dumps(config), "ds.json"), world_size=1, keys=load_catalogue())
    assert (not any(f.severity == "error" for f in found)) is accepted
    assert (start(TRAIN, config, tmp_path).returncode == 0) is accepted
