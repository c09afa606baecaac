"""LoRA adapters: trained under ZeRO-2 and ZeRO-3, exported alone and merged, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, read_manifest
from launcher.token_store import TokenStore
from launcher.worker.export import export_model
from tests.local.launcher_commands import Command
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.local.test_export import assert_same_export, exported
from tests.local.test_losses import evaluated, zero_config
from tests.local.test_methods import ADAPTERS, an_engine, one_rank

pytestmark = pytest.mark.local

UPDATES, SAVED = 8, 4


def lora_plan(job_dict: dict, stage: int, dropout: float = 0.0, **sections: dict) -> Plan:
    job = merged(
        job_dict,
        model={"lora": {"r": 4, "dropout": dropout, "merge": True}},
        train={"max_steps": UPDATES, "weight_decay": 0.1},
        schedule={"peak_lr": 1e-2, "allow_unsafe": True},
        deepspeed=zero_config(stage),
        checkpoint={"every": SAVED, "keep": 2},
    )
    return plan_of(merged(job, **sections))


def made(run: RunDir) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in ("update", "samples", "lr", "loss", "grad_norm")) for line in run.metrics()]


def test_adapters_are_trained_and_resumed_bit_for_bit(job_dict, tmp_path):
    """With dropout, which each rank draws again: the resumed updates equal the first run's to the last bit."""
    plan = lora_plan(job_dict, 2, dropout=0.1)
    run = fine_tuned(plan, tmp_path / "whole")
    check_export(plan, run)
    assert_same_export(exported(run, tmp_path / "exported"), run.export)
    again = fine_tuned(plan, tmp_path / "again", start=saved_halfway(plan, run))
    assert made(again) == made(run)[SAVED:]


def test_adapters_resume_under_zero_3_on_one_rank_with_gradient_checkpointing(job_dict, tmp_path):
    """With `launcher resume`, in a folder whose files are named like packages and must not be imported."""
    plan = lora_plan(job_dict, 3)
    run = fine_tuned(plan, tmp_path / "whole")
    check_export(plan, run)
    assert_same_export(exported(run, tmp_path / "exported"), run.export)
    saved_halfway(plan, run)
    other = RunDir(tmp_path / "alone")
    shutil.copytree(run.path, other.path)
    shutil.rmtree(other.checkpoint(UPDATES))
    shutil.rmtree(other.export)
    for package in ("launcher", "datasets", "deepspeed"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('a file of the user')")
    overrides = ("cluster.processes_per_node=1", "model.gradient_checkpointing=true")
    command = Command("resume", str(other.path), *overrides, folder=tmp_path)
    assert command.wait() == 0, command.output
    assert f"going on after update {SAVED} of {UPDATES}" in command.output
    alone = Plan.from_json(other.plan_revisions()[-1].read_text())
    assert (alone.world.size, alone.gradient_accumulation_steps) == (1, 2)
    assert alone.job.model.gradient_checkpointing
    np.testing.assert_allclose(made(other), made(run), rtol=5e-5)
    check_export(alone, other)


def saved_halfway(plan: Plan, run: RunDir) -> Start:
    """The checkpoint in the middle. It holds the adapters and, of the frozen weights, at most the tied head."""
    checkpoint = run.checkpoint(SAVED)
    for file in checkpoint.glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        frozen = {name for name in state["module"] if ".lora_" not in name}
        assert frozen <= {"base_model.model.lm_head.weight"} and len(state["module"]) > len(frozen)
        assert not state["frozen_param_fragments"]
    manifest = read_manifest(checkpoint)
    assert manifest["plan_sha256"] == plan.sha256
    return Start(checkpoint=str(checkpoint), update=SAVED, samples=manifest["samples"])


def check_export(plan: Plan, run: RunDir) -> None:
    """The export has adapters that peft loads and a merged model, both with the run's last evaluation loss."""
    loss = run.evaluations()[-1]["loss"]
    adapters = run.export / "adapter"
    weights = load_file(adapters / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == plan.model.trainable_parameters
    assert all(tensor.abs().max() > 0 for tensor in weights.values())
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, plan.model.folder)
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == set(plan.model.adapted_modules)

    held_out = TokenStore(Path(plan.data.eval.folder))
    base = AutoModelForCausalLM.from_pretrained(plan.model.folder)
    assert evaluated(base, held_out) > loss
    adapted = PeftModel.from_pretrained(base, adapters)
    assert evaluated(adapted, held_out) == pytest.approx(loss, rel=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(run.export)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert evaluated(whole, held_out) == pytest.approx(loss, rel=1e-5)
    assert AutoTokenizer.from_pretrained(run.export).chat_template


@pytest.mark.usefixtures("one_process")
def test_an_export_without_merging_holds_the_adapters_alone(job_dict, tmp_path):
    """In this process, in bfloat16 and under ZeRO-3: the export is a peft folder."""
    model = {"lora": ADAPTERS, "dtype": "bfloat16"}
    plan, engine = an_engine(job_dict, model=model, deepspeed=zero_config(3))
    assert plan.model.adapted_modules == ("q_proj", "v_proj")
    export_model(engine, plan, one_rank(), tmp_path / "export")
    weights = load_file(tmp_path / "export/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == plan.model.trainable_parameters
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not (tmp_path / "export/config.json").exists()
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plan.model.folder), tmp_path / "export")
