"""Resuming under DeepSpeed JSONs of many kinds: what is continued is what one whole run would have done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import RequestError
from launcher.plan.learning_rate import planned_lrs
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole
from launcher.runs.rest import rest_of
from tests.local.rank_runs import continued, fine_tuned, logs, merged, plan_of

pytestmark = pytest.mark.local

UPDATES, SAVED = 6, 3
OWN_ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}}
LOG = {"total_num_steps": UPDATES, "warmup_num_steps": 3, "warmup_max_lr": 1e-3, "warmup_type": "log"}


def job_with(job_dict: dict, config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A job of the JSON's own optimizer and scheduler as far as it has them, saving once on the way."""
    train = {"max_steps": UPDATES, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    schedule = {} if "scheduler" in config else {"peak_lr": 1e-3, "warmup": 2}
    job = merged({**job_dict, "schedule": schedule}, train=train, checkpoint={"every": SAVED}, export=False)
    return merged(job, deepspeed=config, **sections)


def whole_run(job_dict: dict, folder: Path, config: dict[str, Any], **sections: Any) -> RunDir:
    return fine_tuned(plan_of(job_with(job_dict, config, **sections)), folder)


def resumed(run: RunDir, *overrides: str) -> RunDir:
    """The run's updates after its checkpoint on the way, made again as `launcher resume` does, without Ray."""
    shutil.rmtree(run.checkpoint(UPDATES))
    rest, events = continued(run, *overrides)
    assert [event["code"] for event in events if event["report"] == "exit"] == [0] * rest.plan.world.size, logs(run)
    return run


def column(run: RunDir, key: str) -> list[float]:
    return [line[key] for line in run.metrics()]


@pytest.fixture(scope="module")
def runs():
    """Runs that more than one test looks at, by name."""
    return {}


def own_adam_in_bfloat16(runs: dict[str, RunDir], job_dict: dict, tmp_path_factory) -> RunDir:
    """A run in bfloat16 under ZeRO-2 with an optimizer and a scheduler of the JSON's own."""
    if "own" not in runs:
        config = {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True},
            "optimizer": OWN_ADAM,
            "scheduler": {"type": "WarmupDecayLR", "params": LOG},
        }
        folder = tmp_path_factory.mktemp("own")
        runs["own"] = whole_run(job_dict, folder, config, schedule={"allow_unsafe": True})
    return runs["own"]


def test_bfloat16_with_float32_accumulation_has_the_norm_of_all_ranks_and_resumes(
    job_dict, runs, tmp_path, tmp_path_factory
):
    """Beside it, blocks that watch a run; `load_universal` is for converted checkpoints, and does no harm."""
    watched = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "tiny"},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(tmp_path / "flops.txt")},
        "comms_logger": {"enabled": True},
    }
    config = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": True},
        **watched,
    }
    run = whole_run(job_dict, tmp_path, config)
    other = own_adam_in_bfloat16(runs, job_dict, tmp_path_factory)
    assert column(run, "grad_norm")[0] == pytest.approx(column(other, "grad_norm")[0], rel=0.01)
    before = {key: column(run, key) for key in ("loss", "lr", "grad_norm")}
    resumed(run)
    for key, values in before.items():
        np.testing.assert_allclose(column(run, key), values, rtol=1e-6)
    assert list((tmp_path / "csv").rglob("*.csv"))
    assert (tmp_path / "flops.txt").is_file()
    with pytest.raises(RequestError, match="all 6 updates"):
        rest_of(run, [], RunConsole())


def test_an_optimizer_and_a_scheduler_of_the_jsons_own_resume_on_one_rank(job_dict, runs, tmp_path_factory):
    run = own_adam_in_bfloat16(runs, job_dict, tmp_path_factory)
    before = {key: column(run, key) for key in ("loss", "lr", "samples")}
    resumed(run, "cluster.processes_per_node=1", "schedule.on_spike=warn")
    assert column(run, "lr") == before["lr"]
    assert column(run, "samples") == before["samples"]
    np.testing.assert_allclose(column(run, "loss"), before["loss"], rtol=2e-2)


def test_bfloat16_without_zero_resumes_on_one_rank(job_dict, tmp_path):
    run = whole_run(job_dict, tmp_path, {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}})
    before = {key: column(run, key) for key in ("loss", "lr", "grad_norm")}
    resumed(run, "cluster.processes_per_node=1")
    assert column(run, "lr") == before["lr"]
    np.testing.assert_allclose(column(run, "loss"), before["loss"], rtol=2e-2)
    np.testing.assert_allclose(column(run, "grad_norm"), before["grad_norm"], rtol=0.1)


def test_sgd_under_autocast_resumes_on_its_ranks_and_is_refused_on_others(job_dict, tmp_path):
    config = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}},
    }
    run = whole_run(job_dict, tmp_path, config, schedule={"peak_lr": 1e-2, "allow_unsafe": True})
    before = {key: column(run, key) for key in ("loss", "lr", "grad_norm")}
    with pytest.raises(RequestError, match="all 6 updates"):
        rest_of(run, [], RunConsole())
    resumed(run, "schedule.on_spike=warn")
    for key, values in before.items():
        np.testing.assert_allclose(column(run, key), values, rtol=1e-6)
    shutil.rmtree(run.checkpoint(UPDATES))
    with pytest.raises(RequestError, match=r"cannot be converted for 1: the optimizer is SGD") as refused:
        rest_of(run, ["cluster.processes_per_node=1"], RunConsole())
    assert "resume on 2 ranks" in str(refused.value)


def test_muon_follows_a_cosine_and_is_refused_on_other_ranks(job_dict, tmp_path):
    # PyTorch's Adam and uncompiled kernels: building DeepSpeed's takes minutes, and is not what is tested.
    optimizer = {"type": "Muon", "params": {"momentum": 0.9, "torch_adam": True}}
    config = {"zero_optimization": {"stage": 2}, "optimizer": optimizer}
    plan = plan_of(job_with(job_dict, config, schedule={"shape": "cosine"}))
    planned = planned_lrs(plan)
    plain = {rank: {"TORCHDYNAMO_DISABLE": "1"} for rank in range(2)}
    run = fine_tuned(plan, tmp_path, environments=plain)
    assert column(run, "lr") == [planned(update) for update in range(UPDATES)]
    before = column(run, "loss")
    assert before[-1] < before[0]
    shutil.rmtree(run.checkpoint(UPDATES))
    with pytest.raises(RequestError, match=r"cannot be converted for 1: the optimizer is Muon"):
        rest_of(run, ["cluster.processes_per_node=1"], RunConsole())
