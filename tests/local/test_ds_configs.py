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
from launcher.ds_config.target import Target
from launcher.plan.inputs import plan_inputs
from launcher.plan.resolve import resolve
from tests.unit.ds_config.public_shapes import TEMPLATES
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts

pytestmark = pytest.mark.local

PRESETS = Path(__file__).parents[2] / "ds_configs"
ON_CPU = ("zero1", "zero2", "zero3", "zero3_cpu_offload")
ALL = sorted(path.stem for path in PRESETS.glob("*.json"))

TRAIN = """
import json, sys
import torch, deepspeed

def train(config):
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
    return {
        "stage": engine.zero_optimization_stage(),
        "losses": losses,
        "updates": engine.global_steps,
        "clip": engine.gradient_clipping(),
        "scheduler": type(scheduler).__name__,
        "micro": engine.train_micro_batch_size_per_gpu(),
    }

# Only inference uses this kernel, and building it takes long.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
"""
PARSE = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig

def parse(config):
    parsed = DeepSpeedConfig(config)
    zero = parsed.zero_config
    return {
        "stage": zero.stage,
        "hpz": zero.zero_hpz_partition_size,
        "quantized": [zero.zero_quantized_weights, zero.zero_quantized_gradients],
        "nvme": [str(block and block.nvme_path) for block in (zero.offload_param, zero.offload_optimizer)],
        "buckets": [zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold],
        "bf16": parsed.bfloat16_config.enabled,
        "batch": parsed.train_batch_size,
    }
"""
EACH = """
for line in sys.stdin:
    try:
        result = {function}(json.loads(line))
    except BaseException as error:
        result = {{"error": f"{{type(error).__name__}}: {{error}}"}}
    print("result", json.dumps(result), flush=True)
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


def outcomes(script: str, function: str, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a function of `script` returns for each config, or its error: one process, since DeepSpeed loads slowly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", script + EACH.format(function=function)],
        input="".join(json.dumps(config) + "\n" for config in configs),
        capture_output=True,
        text=True,
        env={**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("result ")]
    assert len(results) == len(configs), done.stderr[-3000:]
    return results


def test_presets_train_on_a_cpu() -> None:
    results = outcomes(TRAIN, "train", [completed(preset, "cpu") for preset in ON_CPU])
    for preset, result in zip(ON_CPU, results, strict=True):
        assert "error" not in result, (preset, result)
        assert result["stage"] == int(preset[4])
        assert result["updates"] == 6
        assert result["losses"][-1] < result["losses"][0], preset
        assert (result["clip"], result["scheduler"], result["micro"]) == (1.0, "WarmupDecayLR", 2)


def test_presets_and_templates_of_others_are_parsed_as_they_are_planned() -> None:
    """Plans for one GPU, since DeepSpeed reckons batch sizes with the ranks that there are."""
    facts, machine = (model_facts(), data_facts()), machine_facts(1)
    job = job_of(train={"max_steps": 100})
    jsons = {name: parse_ds_config(text, "ds.json") for name, text in TEMPLATES.items()}
    plans = {name: resolve(plan_inputs(job, user, machine), *facts) for name, user in jsons.items()}
    configs = [*(completed(preset, "cuda") for preset in ALL), *(plan.ds_config for plan in plans.values())]
    results = dict(zip((*ALL, *plans), outcomes(PARSE, "parse", configs), strict=True))
    for name, plan in plans.items():
        assert "error" not in results[name], (name, results[name])
        assert (results[name]["bf16"], results[name]["stage"]) == (True, plan.zero_stage), name
        assert results[name]["batch"] == plan.train_batch_size, name
    assert set(ALL) == {*ON_CPU, "zero3_many_nodes", "zero3_nvme_offload"}
    for preset in ALL:
        result = results[preset]
        assert "error" not in result, (preset, result)
        assert result["stage"] == int(preset[4])
        assert (result["bf16"], result["batch"]) == (True, 2)
        many, nvme = preset == "zero3_many_nodes", preset == "zero3_nvme_offload"
        assert (result["hpz"], result["quantized"]) == ((8, [True, True]) if many else (1, [False, False]))
        assert result["nvme"] == (["/local_nvme", "/local_nvme"] if nvme else ["None", "None"])
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
    ({"zero_optimization": {"stage": 3, "gather_16bit_weights_on_model_save": True}}, True),
    ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 9, "stage3_prefetch_bucket_size": 9}}, False),
    ({"bf16": {"enabled": "yes"}}, True),
    ({"fp16": {"enabled": False, "loss_scale": -1}}, False),
    ({"zero_optimization": 1}, False),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e30}}, False),
    ({"bf16": {"enabled": "on"}, "fp16": {"enabled": 1}}, False),
    ({"bf16": {"enabled": "false"}, "fp16": {"enabled": 0}}, True),
    ({"gradient_clipping": "1.0"}, False),
    ({"steps_per_print": "10"}, False),
    ({"steps_per_print": None}, True),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "betas": [0.9]}}}, False),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "weight_decay": -1}}}, False),
    ({"optimizer": {"type": "FusedAdam", "params": {"lr": 1e-5}}}, False),
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


def test_lint_judges_as_deepspeed_does() -> None:
    base = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    }
    configs = [base | changed for changed, _ in VERDICTS]
    for config, (changed, accepted), result in zip(configs, VERDICTS, outcomes(TRAIN, "train", configs), strict=True):
        found = lint(parse_ds_config(json.dumps(config), "ds.json"), Target("cpu", 1), load_catalogue())
        assert (not any(f.severity == "error" for f in found)) is accepted, changed
        assert ("error" not in result) is accepted, (changed, result)
