"""NaN and Inf in loaded weights are found on every rank before training, and reported."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.plan.resume import Start
from launcher.run_dir import RunDir, read_manifest
from launcher.worker.finite_weights import UnsoundWeights, check_weights, held_by_rank
from tests.local.launcher_commands import Command, run_folder, write_job
from tests.local.rank_runs import fine_tuned, logs, merged, plan_of, run_ranks
from tests.unit.inputs import command

pytestmark = pytest.mark.local

NAME = "model.layers.1.mlp.down_proj.weight"


def with_a_nan(model: Path, folder: Path) -> Path:
    """A copy of a model folder with one NaN at the end of a weight, which ZeRO-3 gives to the last rank."""
    copy = Path(shutil.copytree(model, folder))
    weights = load_file(copy / "model.safetensors")
    weights[NAME][-1, -1] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_nan_that_one_rank_loads_fails_the_run_before_it_trains(job_dict, tiny_model, tmp_path, shared_ray):
    """The NaN is in a frozen weight under an adapter, in the last rank's part of ZeRO-3."""
    model = with_a_nan(tiny_model, tmp_path / "model")
    job = merged(job_dict, model={"name_or_path": str(model), "lora": {"r": 2}}, deepspeed="zero3")
    running = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **shared_ray)
    assert running.wait() == 1, running.output
    run = RunDir(run_folder(tmp_path))
    assert (run.state()["state"], run.state()["code"]) == ("failed", "nan_weights")
    (failure,) = [event for event in run.events() if event["event"] == "failure"]
    assert [(one["rank"], one["code"]) for one in sorted(failure["failures"], key=lambda one: one["rank"])] == [
        (0, "nan_weights"),
        (1, "nan_weights"),
    ]
    assert failure["error"].startswith(f"UnsoundWeights: the weights of {model} hold NaN or Inf in 1 of ")
    assert f"first in {NAME}, as loaded in float32" in failure["error"]
    assert run.metrics() == run.evaluations() == list(run.checkpoints.iterdir()) == []
    why = command("why", str(run.path)).out
    assert "likely cause: the loaded weights hold NaN or Inf\n" in why and why.rstrip() in running.output
    assert "peak_lr" not in running.output + why


def test_a_nan_in_a_checkpoint_fails_the_resume(job_dict, tmp_path):
    job = merged(job_dict, train={"max_steps": 2}, cluster={"processes_per_node": 1}, checkpoint={"every": 1})
    plan = plan_of(merged(job, export=False))
    run = fine_tuned(plan, tmp_path)
    checkpoint = run.checkpoint(1)
    for file in checkpoint.glob("*_states.pt"):
        state = torch.load(file, weights_only=False)
        for tensor in tensors_of(state):
            if tensor.is_floating_point() and tensor.numel() > 1000:
                tensor.detach().view(-1)[7] = float("inf")
        torch.save(state, file)
    start = Start(checkpoint=str(checkpoint), update=1, samples=read_manifest(checkpoint)["samples"])
    (failed,) = [event for event in run_ranks(plan, run, start=start) if event["report"] == "failed"]
    assert failed["code"] == "nan_weights", logs(run)
    assert failed["message"].startswith(f"the weights of {checkpoint} hold NaN or Inf in ")


def tensors_of(value):
    """Every tensor in nested dictionaries and lists."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(each)


class Alone:
    """The only rank."""

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_whatever_is_not_finite_is_found_and_nothing_else(dtype, value):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        model[1].bias[0] = torch.finfo(dtype).max
        model[0].bias[0] = torch.finfo(dtype).min
    check_weights(model, Alone(), "folder")
    with torch.no_grad():
        model[1].weight[1, 2] = float(value)
    model[0].weight.requires_grad = False
    for checkpoint, origin in ((None, "folder"), ("update-3", "update-3")):
        with pytest.raises(UnsoundWeights, match=rf"^the weights of {origin} hold NaN or Inf in 1 of 4 .* 1\.weight, "):
            check_weights(model, Alone(), "folder", checkpoint)
    with torch.no_grad():
        model[0].weight[0, 0] = float(value)
    with pytest.raises(UnsoundWeights, match=r"^the weights of folder hold NaN or Inf in 2 of 4 .* 0\.weight, "):
        check_weights(model, Alone(), "folder", "update-3")


def test_quantised_weights_and_padding_are_not_looked_at():
    model = torch.nn.Module()
    model.quantised = torch.nn.Parameter(torch.tensor([255, 255], dtype=torch.uint8), requires_grad=False)
    check_weights(model, Alone(), "folder")
    # Five values on two ranks: the second has two of them and one of padding, which is never written.
    part = torch.tensor([1.0, 2.0, float("nan")])
    part.ds_numel = 3
    sharded = SimpleNamespace(ds_tensor=part, ds_numel=5, ds_zero_partition_rank=1)
    assert held_by_rank(sharded).tolist() == [1.0, 2.0]
