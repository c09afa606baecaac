"""Random job files and overrides, from their bytes to the plan: only errors of the launcher, with short messages."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from launcher.job import LoadedJob, load_job
from launcher.plan.inputs import is_script, is_training, plan_inputs
from launcher.plan.resolve import check_inputs, resolve
from launcher.plan.schema import Plan
from launcher.plan.script import check_script_inputs, resolve_script
from launcher.runs.planning import lint_ds_config, load_ds_config
from tests.fork_server import REPOSITORY
from tests.unit.fuzz.mutations import damaged, inputs, mutated, only_launcher_errors, value
from tests.unit.inputs import data_facts, machine_facts, model_facts

JOBS: tuple[dict[str, Any], ...] = (
    yaml.safe_load((REPOSITORY / "examples/quickstart.yaml").read_text()),
    {
        "name": "full",
        "model": {"name_or_path": "m", "revision": "main", "dtype": "bfloat16", "trust_remote_code": True},
        "data": {"train": ["a.jsonl", "b.jsonl"], "eval": 0.1, "max_length": 64, "chat_template_kwargs": {"a": 1}},
        "train": {"max_steps": 100, "train_batch_size": 64, "gradient_accumulation_steps": 2, "betas": [0.9, 0.99]},
        "schedule": {
            "shape": "wsd",
            "peak_lr": 1e-5,
            "warmup": "3%",
            "floor": 0.1,
            "decay_start": 0.7,
            "decay": "1-sqrt",
        },
        "deepspeed": {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
        "cluster": {"nodes": 2, "gpus_per_node": 8, "env": {"NCCL_DEBUG": "INFO"}},
        "checkpoint": {"every": 10, "keep": 3, "keep_every": 50, "keep_best": 1},
    },
    {
        "name": "steps",
        "model": {"name_or_path": "m", "freeze": ["model.layers.[0-7]"]},
        "data": {"train": "a.jsonl", "eval": "b.jsonl"},
        "train": {"total_samples": 1000, "train_micro_batch_size_per_gpu": 2, "eval_every": 5},
        "schedule": {"shape": "step", "decay_at": [0.5, 30], "decay_factor": [0.5, 0.1], "peak_lr": 1e-5},
        "deepspeed": "zero1",
        "cluster": {"gpus_per_node": 0, "processes_per_node": 4},
    },
    {
        "name": "compound",
        "model": {"name_or_path": "m"},
        "data": {"train": "a.jsonl"},
        "train": {"num_train_epochs": 3},
        "schedule": {
            "shape": "compound",
            "warmup": "20k tokens",
            "peak_lr": "2e-5",
            "segments": [{"kind": "cosine", "until": 0.5, "to": 0.3}, {"kind": "linear", "until": 1.0, "to": 0.0}],
        },
        "slurm": {"time": "1:00:00", "mem": 64000, "array": "0-3", "array_key": "train.seed", "extra": ["--x=1"]},
    },
    {
        "name": "script",
        "script": {"command": "train.py --deepspeed {ds_config} --steps 5", "folder": "."},
        "train": {"max_steps": 10, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 1},
        "schedule": {"peak_lr": 1e-5},
        "deepspeed": "zero2",
    },
)


def plan_of(loaded: LoadedJob) -> Plan:
    """The plan with given facts in place of measured ones."""
    with loaded.locate_errors():
        inputs = plan_inputs(loaded.job, load_ds_config(loaded), machine_facts(8))
        lint_ds_config(inputs)
        if is_script(inputs):
            check_script_inputs(inputs)
            return resolve_script(inputs, model_facts(), "/work")
        assert is_training(inputs)
        check_inputs(inputs)
        return resolve(inputs, model_facts(), data_facts(evaluated=10))


def check(source: Path | dict[str, Any], given: Any, *overrides: str) -> None:
    with only_launcher_errors(given):
        plan = plan_of(load_job(source, *overrides))
        assert Plan.from_json(plan.to_json()).sha256 == plan.sha256


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_bytes_of_a_job_file(tmp_path: Path) -> None:
    texts = [yaml.safe_dump(job, sort_keys=False).encode() for job in JOBS]
    file = tmp_path / "job.yaml"
    for random in inputs("job bytes", 1500):
        text = damaged(random, random.choice(texts))
        file.write_bytes(text)
        check(file, text)


def test_values_of_a_job() -> None:
    for random in inputs("job values", 2000):
        job = mutated(random, random.choice(JOBS))
        if isinstance(job, dict):
            check(job, job)


def test_overrides() -> None:
    for random in inputs("overrides", 800):
        job = random.choice(JOBS)
        overrides = [override(random) for _ in range(random.randint(1, 3))]
        check(job, (job["name"], overrides), *overrides)


def override(random: Random) -> str:
    section = random.choice(JOBS[1:])
    name = random.choice(list(section))
    inner = section[name]
    key = f"{name}.{random.choice(list(inner))}" if isinstance(inner, dict) else name
    if random.random() < 0.1:
        key = damaged(random, key.encode()).decode(errors="surrogateescape")
    text = value(random)
    return f"{key}={text if isinstance(text, str) else yaml.safe_dump(text).split(chr(10))[0]}"
