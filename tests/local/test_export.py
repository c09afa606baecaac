"""Exports from checkpoints equal the run's own export bit for bit, also after the run was killed while exporting."""

from __future__ import annotations

import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.errors import RunFailed
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.worker.exporter import fill
from tests.fork_server import fork_environment
from tests.local.launcher_commands import Command
from tests.local.rank_runs import fine_tuned, logs, merged, plan_of, run_directory, run_ranks
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local

UPDATES, SAVED = 6, 3
DYING = ("-m", "tests.local.dying_worker")


def export_plan(job_dict: dict, stage: int, **sections: dict) -> Plan:
    job = merged(
        job_dict,
        train={"max_steps": UPDATES},
        schedule={"peak_lr": 1e-2, "allow_unsafe": True},
        deepspeed=zero_config(stage),
        checkpoint={"every": SAVED, "keep": 2},
    )
    return plan_of(merged(job, **sections))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of an export, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{f.relative_to(folder)}:{name}": t for f in files for name, t in load_file(f).items()}


def assert_same_export(one: Path, other: Path) -> None:
    """The same files, with the same bits in every tensor."""
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(other) for p in other.rglob("*"))
    ones, others = tensors(one), tensors(other)
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name
    for file in one.rglob("*.json"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()


def exported(run: RunDir, folder: Path, *options: str) -> Path:
    command = Command(
        "export", str(run.path), "--output", str(folder), *options, folder=run.path.parent, **fork_environment()
    )
    assert command.wait() == 0, command.output
    return folder


def test_a_run_killed_while_exporting_is_resumed_to_its_export(job_dict, tmp_path, shared_ray):
    """Under ZeRO-3 in bfloat16, where the weights are assembled from the ranks' float32 shards."""
    plan = export_plan(job_dict, 3, model={"dtype": "bfloat16"})
    run = run_directory(plan, tmp_path)
    events = run_ranks(plan, run, command=DYING)
    assert [event["code"] for event in events if event["report"] == "exit"] == [-signal.SIGKILL] * 2, logs(run)
    assert run.complete_checkpoints() == [SAVED, UPDATES]
    assert not run.export.exists()

    resumed = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    assert resumed.wait() == 0, resumed.output
    assert f"all {UPDATES} updates are made: only the export is missing" in resumed.output
    assert run.state()["state"] == "finished"
    assert len(run.metrics()) == UPDATES
    assert_same_export(run.export, run.path / "expected")
    assert {t.dtype for t in tensors(run.export).values()} == {torch.bfloat16}
    assert not list(run.path.glob(".export*"))
    assert stat.S_IMODE(run.export.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in run.export.iterdir()} == {0o600}

    again = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    assert again.wait() == 2
    assert f"all {UPDATES} updates are made already" in again.output

    # A float32 export holds the optimizer's own weights, which training casts.
    precise = tensors(exported(run, tmp_path / "precise", "--dtype", "float32"))
    assert {t.dtype for t in precise.values()} == {torch.float32}
    for name, tensor in tensors(run.export).items():
        assert torch.equal(precise[name].bfloat16(), tensor)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in precise.values())


@pytest.mark.parametrize("stage", [2])
def test_an_export_of_the_last_checkpoint_equals_that_of_the_run(job_dict, tmp_path, shared_ray, stage):
    run = fine_tuned(export_plan(job_dict, stage, model={"freeze": ["model.layers.0.*", "*.norm"]}), tmp_path)
    assert_same_export(exported(run, tmp_path / "last"), run.export)
    earlier = tensors(exported(run, tmp_path / "earlier", "--update", str(SAVED), "--dtype", "float16"))
    assert {t.dtype for t in earlier.values()} == {torch.float16}
    assert any(not torch.equal(t.half(), earlier[name]) for name, t in tensors(run.export).items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "earlier")

    refused = Command("export", str(run.path), "--update", "4", folder=tmp_path, **shared_ray)
    assert refused.wait() == 2
    assert f"checkpoints of these updates can be used: {SAVED}, {UPDATES}" in refused.output


def test_weights_of_another_model_are_refused():
    model = torch.nn.Linear(2, 3)
    weights = {name: torch.full_like(tensor, 7.0).half() for name, tensor in model.state_dict().items()}
    for changed, words in (
        ({"weight": weights["weight"]}, "it lacks bias"),
        ({**weights, "bias": torch.zeros(2)}, "it differs in bias"),
        ({**weights, "other": torch.zeros(2)}, "it differs in other"),
    ):
        with pytest.raises(RunFailed, match=words):
            fill(model, changed, lambda _: None)
    model.bias.requires_grad_(False)
    fill(model, {"weight": weights["weight"]}, lambda _: None)
    fill(model, weights, lambda _: None)
    assert all(torch.equal(tensor, torch.full_like(tensor, 7.0)) for tensor in model.state_dict().values())
