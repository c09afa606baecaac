"""What `launcher plan` prints; it writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.plan.schema import Plan
from tests.unit.inputs import command, data_facts, model_facts, remember, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_prints_a_plan_and_writes_nothing(folder: Path) -> None:
    sizes = ("train.train_batch_size=32", "train.train_micro_batch_size_per_gpu=8")
    remember(folder / "job.yaml", sizes, model_facts(parameters=1_000_000), data_facts(320))
    before = set(folder.rglob("*"))
    ended = command("plan", "job.yaml", *sizes)
    assert ended.status == 0
    for words in (
        "llama, 1,000,000 parameters",
        "4 ranks: 1 node x 4 on CPU, gloo, fp32",
        "320 sequences, 32,000 tokens, 19,200 learned",
        "32 = micro-batch 8 x accumulation 1 x world size 4",
        "10 in total, 10.0 per epoch",
        "learning rate",
        "memory per process",
        "under ZeRO-2",
        "filled in or changed",
    ):
        assert words in ended.out
    assert set(folder.rglob("*")) == before


def test_plan_prints_what_spare_nodes_cost(folder: Path) -> None:
    overrides = ("cluster.nodes=2", "cluster.spare_nodes=1")
    remember(folder / "job.yaml", overrides, model_facts(), data_facts())
    printed = command("plan", "job.yaml", *overrides).out
    assert "8 ranks: 2 nodes x 4 on CPU, gloo, fp32" in printed
    assert re.search(r"^spare nodes +1, allocated without ranks *$", printed, re.MULTILINE)


def test_plan_prints_json(folder: Path) -> None:
    overrides = ("train.max_steps=7", "schedule.peak_lr=1e-5")
    remember(folder / "job.yaml", overrides, model_facts(), data_facts())
    ended = command("plan", "job.yaml", *overrides, "--json")
    assert ended.status == 0
    plan = Plan.from_json(ended.out)
    assert plan.length.total_updates == 7
    assert plan.learning_rate.peak_lr == 1e-5
    assert command("plan", "job.yaml", *overrides, "--json").out == ended.out
