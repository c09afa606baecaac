"""Random job files and overrides, from their bytes to a plan: each is planned, or rejected with a launcher error."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from launcher.job import load_job
from launcher.job.load import LoadedJob
from launcher.job.schema import Job, ScriptJob
from launcher.plan.inputs import is_script, is_training
from launcher.plan.resolve import resolve
from launcher.plan.schema import Plan
from launcher.plan.script import resolve_script
from launcher.runs.planning import check_job
from tests.unit.fuzz.cases import TEXTS, any_value, cases, check, mutated, mutated_bytes
from tests.unit.inputs import data_facts, machine_facts, model_facts, write_folder

TRAINING: dict[str, Any] = {
    "name": "tiny",
    "model": {"name_or_path": "model", "dtype": "float32", "freeze": [], "lora": None},
    "data": {"train": ["data/train.jsonl"], "eval": 0.1, "max_length": 128, "chat_template_kwargs": {"a": 1}},
    "train": {"max_steps": 20, "train_batch_size": 32, "betas": [0.9, 0.95], "eps": 1e-8, "eval_every": 5, "seed": 3},
    "schedule": {
        "shape": "wsd",
        "peak_lr": 1e-5,
        "warmup": 4,
        "floor": 0.1,
        "decay_start": 0.8,
        "decay": "linear",
        "task": "similar",
    },
    "deepspeed": {
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8},
    },
    "cluster": {"nodes": 2, "gpus_per_node": 0, "processes_per_node": 4, "env": {"A": "b"}, "wait_seconds": 5.0},
    "checkpoint": {"every": 10, "keep": 2, "keep_best": 1},
    "slurm": {"partition": "p", "time": "1:00:00", "mem": "4G", "modules": ["cuda/12"], "extra": ["--licenses=a:1"]},
    "export": True,
    "output_dir": "runs",
}
SHAPES: tuple[dict[str, Any], ...] = (
    {"shape": "auto"},
    {"shape": "step", "peak_lr": 1e-5, "warmup": "3%", "decay_at": [0.5, 15], "decay_factor": [0.1, 0.2]},
    {"shape": "cosine_restarts", "peak_lr": 1e-5, "warmup": 0.1, "cycles": 2},
    {
        "shape": "compound",
        "peak_lr": 1e-5,
        "warmup": "1k tokens",
        "segments": [{"kind": "cosine", "until": 0.5, "to": 0.5}, {"kind": "1-sqrt", "until": 20, "to": 0.0}],
    },
    {"shape": "cosine", "peak_lr": 1e-5, "warmup": 0, "warmup_type": "log", "allow_unsafe": True},
)
SCRIPT: dict[str, Any] = {
    "name": "script",
    "script": {"command": ["train.py", "--x", "1"], "folder": "."},
    "train": {"max_steps": 20, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
    "schedule": {"shape": "linear", "peak_lr": 1e-5, "warmup": 2},
    "cluster": {"gpus_per_node": 0, "processes_per_node": 2},
}
PLAUSIBLE = (1, 2, 3, 8, 20, 0.1, 0.5, 1e-6, 1e9, 10**12, [0.5], [0.1, 0.9], True, False, None, "auto", "zero3", "step")
KEYS = [
    f"{name}.{key}" if inner else name
    for name, info in (Job.model_fields | ScriptJob.model_fields).items()
    for inner in [getattr(info.annotation, "model_fields", {})]
    for key in inner or [name]
]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder has the model, the data and the script of the jobs."""
    made = tmp_path_factory.mktemp("jobs")
    write_folder(made)
    (made / "train.py").write_text("")
    return made


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def base(rng: Random) -> dict[str, Any]:
    if rng.random() < 0.2:
        return SCRIPT
    schedule = rng.choice((TRAINING["schedule"], *SHAPES))
    return {**TRAINING, "schedule": schedule, "deepspeed": rng.choice((TRAINING["deepspeed"], "zero3", "auto"))}


def planned(loaded: LoadedJob) -> Plan:
    checked = check_job(loaded, machine_facts())
    with loaded.locate_errors():
        if is_script(checked.inputs):
            plan = resolve_script(checked.inputs, None, ".")
        else:
            assert is_training(checked.inputs)
            plan = resolve(checked.inputs, model_facts(), data_facts(evaluated=100))
    return Plan.from_json(plan.to_json())


def test_the_unchanged_jobs_are_valid() -> None:
    for schedule in SHAPES:
        assert not check(schedule, lambda schedule=schedule: planned(load_job({**TRAINING, "schedule": schedule})))
    assert not check("training", lambda: planned(load_job(TRAINING)))
    assert not check("script", lambda: planned(load_job(SCRIPT)))


def test_bytes_of_job_files(folder: Path) -> None:
    file = folder / "bytes.yaml"
    texts = [yaml.safe_dump(job, sort_keys=False).encode() for job in (TRAINING, SCRIPT)]
    for rng in cases("job bytes", 1700):
        content = mutated_bytes(rng, rng.choice(texts))
        file.write_bytes(content)
        check(content, lambda: planned(load_job(file)))


def test_values_in_jobs() -> None:
    for rng in cases("job values", 2000):
        job = mutated(rng, base(rng))
        if isinstance(job, dict):
            check(job, lambda job=job: planned(load_job(job)))


def test_overrides() -> None:
    for rng in cases("overrides", 1900):
        overrides = [override(rng) for _ in range(rng.choice((1, 1, 2)))]
        check(overrides, lambda overrides=overrides: planned(load_job(TRAINING, *overrides)))


def override(rng: Random) -> str:
    name = rng.choice(KEYS) if rng.random() < 0.9 else str(rng.choice(TEXTS))
    value = any_value(rng) if rng.random() < 0.4 else rng.choice(PLAUSIBLE)
    text = value if isinstance(value, str) else json.dumps(value)
    if rng.random() < 0.3:
        text = mutated_bytes(rng, text.encode(errors="surrogatepass")).decode(errors="surrogateescape")
    return rng.choice((f"{name}={text}", f"{name}={text}", f"{name}.x={text}", f"{name}{text}"))
