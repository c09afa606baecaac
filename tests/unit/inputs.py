"""Facts, jobs and folders for tests of planning without torch, and commands that run in this process."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launcher import cli
from launcher.ds_config import DsConfig, from_mapping, read_ds_config
from launcher.job import Job, load_job, validate_job
from launcher.plan.facts import DataFacts, MachineFacts, ModelFacts, SplitFacts
from launcher.plan.inputs import plan_inputs
from launcher.plan.resolve import resolve
from launcher.plan.schema import Plan
from launcher.prepare import cache_folder
from launcher.prepare.request import Request, _data_folder, _model_facts_file
from launcher.presets import shipped_folder

GIB = 1024**3


def model_facts(**changes: Any) -> ModelFacts:
    """A Llama with 8 billion parameters."""
    facts: dict[str, Any] = {
        "folder": "/models/llama",
        "model_type": "llama",
        "parameters": 8_000_000_000,
        "embedding_parameters": 1_050_000_000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layers": 32,
        "attention_heads": 32,
        "vocab_size": 128_256,
        "max_positions": 8192,
        "tied_embeddings": False,
        "stored_dtype": "bfloat16",
        "supports_gradient_checkpointing": True,
        "has_chat_template": True,
    }
    facts = {**facts, **changes}
    return ModelFacts(**{"trainable_parameters": facts["parameters"], **facts})


def split_facts(sequences: int = 1000, **changes: Any) -> SplitFacts:
    """A split of sequences with 100 tokens, 60 of them targets."""
    facts: dict[str, Any] = {
        "folder": "/cache/train",
        "rows": sequences,
        "sequences": sequences,
        "tokens": 100 * sequences,
        "targets": 60 * sequences,
        "longest": 100,
        "cut": 0,
        "dropped": 0,
        "partly_learned": 0,
    }
    return SplitFacts(**{**facts, **changes})


def data_facts(sequences: int = 1000, evaluated: int | None = None, **changes: Any) -> DataFacts:
    held_out = split_facts(evaluated) if evaluated else None
    return DataFacts(fingerprint="0" * 24, format="messages", train=split_facts(sequences, **changes), eval=held_out)


def machine_facts(gpus: int = 0, gpu_gib: int = 80, **changes: Any) -> MachineFacts:
    """A node with `gpus` GPUs that support bfloat16, 64 CPUs and 1 TiB of memory."""
    facts: dict[str, Any] = {
        "device": "cuda" if gpus else "cpu",
        "device_name": "H100" if gpus else "CPU",
        "gpus": gpus,
        "gpu_memory_bytes": gpu_gib * GIB if gpus else 0,
        "bf16": bool(gpus),
        "cpus": 64,
        "memory_bytes": 1024 * GIB,
        "versions": {"deepspeed": "0.19.8"},
    }
    return MachineFacts(**{**facts, **changes})


def job_of(**sections: Any) -> Job:
    """A valid job; `sections` replace keys in its sections."""
    base: dict[str, Any] = {"name": "tiny", "model": {"name_or_path": "model"}, "data": {"train": "train.jsonl"}}
    for name, value in copy.deepcopy(sections).items():
        mapping = isinstance(value, dict) and name != "deepspeed"
        base[name] = {**base.get(name, {}), **value} if mapping else value
    return validate_job(base)


def preset(name: str) -> DsConfig:
    return read_ds_config(shipped_folder("ds_configs") / f"{name}.json")


def plan_of(
    job: Job | None = None,
    user: dict[str, Any] | None = None,
    model: ModelFacts | None = None,
    data: DataFacts | None = None,
    machine: MachineFacts | None = None,
) -> Plan:
    """The plan of a job, with default facts for those not given."""
    config = preset("zero2") if user is None else from_mapping(user, "ds.json")
    inputs = plan_inputs(job or job_of(), config, machine or machine_facts(8))
    return resolve(inputs, model or model_facts(), data or data_facts())


def in_format_1(plan: Plan) -> dict[str, Any]:
    """plan.json of a training as the first version of the launcher wrote it."""
    data = plan.model_dump(mode="json")
    workload = data.pop("workload")
    del workload["kind"], workload["background_copy_bytes"], workload["chunked_loss"]
    data |= workload
    return {"sha256": format_1_hash(data), "plan": data}


def format_1_hash(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Ended:
    """The exit status and output of a command."""

    status: int
    out: str
    err: str


def command(*arguments: str) -> Ended:
    """Runs `launcher ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        patch.object(sys, "argv", ["launcher", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ended(status, out.getvalue(), err.getvalue())


def as_nobody(folder: Path, *arguments: str) -> Ended:
    """Runs `launcher ARGUMENTS` in a child process as user nobody; needs root.

    Makes the folders above `folder` readable for that user while the command runs.
    """
    with (Path(tempfile.gettempdir()) / "launcher-tests-as-nobody.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _as_nobody(folder, *arguments)


def _as_nobody(folder: Path, *arguments: str) -> Ended:
    closed = [each for each in (folder, *folder.parents) if not each.stat().st_mode & 0o005]
    for each in closed:
        each.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        ended = command(*arguments)
        os.write(write, json.dumps([ended.status, ended.out, ended.err]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        output = answer.read()
    os.waitpid(child, 0)
    for each in closed:
        each.chmod(0o700)
    return Ended(*json.loads(output))


JOB = """\
model: {name_or_path: model}
data: {train: data/train.jsonl}
cluster: {gpus_per_node: 0, processes_per_node: 4}
"""


def write_folder(folder: Path, job: str = JOB) -> None:
    """Writes a job file, and the model and data that it names."""
    (folder / "job.yaml").write_text(job)
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text('{"text": "a"}\n')
    (folder / "data/held-out.jsonl").write_text('{"text": "b"}\n')


def remember(job_file: Path, overrides: tuple[str, ...], model: ModelFacts, data: DataFacts) -> None:
    """Writes facts into the job's cache as a measurement does. The job's folder must be the current folder."""
    job = load_job(job_file, *overrides).job
    request = Request(job=job, cache=cache_folder(job))
    folder = Path(job.model.name_or_path).resolve()
    _write(_model_facts_file(request), model.model_copy(update={"folder": str(folder)}).model_dump_json())
    _write(_data_folder(request, folder) / "facts.json", data.model_dump_json())


def _write(path: Path, text: str) -> None:
    json.loads(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
