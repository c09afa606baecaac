"""Writes a tiny ZeRO-3 job into a folder that all hosts see, and reads its runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.run_dir import RunDir
from tests.tiny_models import make_tiny_model, write_chats

BIN = Path(sys.executable).parent
# The presets' bucket sizes follow the hidden size; a tiny model needs its parameters really partitioned.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

_RAISES_ON_RANK_1 = """
import os
from pathlib import Path

if os.environ.get("RANK") == "1":
    from launcher.worker import train

    advance = train.TrainLoop.advance

    def with_fault(self, *arguments):
        if Path(__file__).with_name("now").exists():
            raise ValueError("a bad sample on this node")
        advance(self, *arguments)

    train.TrainLoop.advance = with_fault
"""


def write_fault(folder: Path) -> Path:
    """A folder for PYTHONPATH with which rank 1 raises ValueError("a bad sample on this node") once it holds `now`."""
    faulty = folder / "faulty"
    faulty.mkdir()
    (faulty / "sitecustomize.py").write_text(_RAISES_ON_RANK_1)
    return faulty


def write_tiny_job(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """`folder`/`name`.yaml: twelve sequences per update, which divide among one, two and three hosts.

    Model, data and tokens are beside the folder, and are made once for all tests.
    """
    common = folder.parent / "common"
    if not common.exists():
        make_tiny_model(common / "model")
        write_chats(common / "chats.jsonl", 40)
    job: dict[str, Any] = {
        "name": name,
        "model": {"name_or_path": str(common / "model")},
        "data": {
            "train": str(common / "chats.jsonl"),
            "eval": 0.2,
            "max_length": 64,
            "cache_dir": str(common / "cache"),
        },
        "train": {"max_steps": 4, "restarts": 0, "train_batch_size": 12, "train_micro_batch_size_per_gpu": 2},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 1},
        "cluster": {"processes_per_node": 1, "gpus_per_node": 0},
        "deepspeed": ZERO3,
        "output_dir": str(folder / "runs"),
    }
    for key, value in sections.items():
        job[key] = {**job.get(key, {}), **value} if isinstance(value, Mapping) and key != "deepspeed" else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def runs_of(folder: Path, name: str = "tiny") -> list[RunDir]:
    """The run directories of a job in `folder`."""
    return [RunDir(path.parent) for path in sorted((folder / "runs").glob(f"{name}-*/state.json"))]


def losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in run.metrics()]


def hosts_of_ranks(run: RunDir) -> dict[int, str]:
    """The host of each rank, from the nodes' own files."""
    found = {}
    for file in sorted(run.logs.glob("node-*/node.json")):
        node = json.loads(file.read_text())
        found |= {rank["rank"]: node["host"] for rank in node["ranks"]}
    return dict(sorted(found.items()))
