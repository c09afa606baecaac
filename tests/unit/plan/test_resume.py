"""Planning a resume: values of the JSON, unsupported features, and which checkpoints can be converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.job import explicit_keys
from launcher.plan.checkpoint_conversion import check_same_kind_of_state, expected_ranks, must_convert
from launcher.plan.inputs import plan_inputs
from launcher.plan.resolve import check_inputs, resolve
from launcher.plan.resume import resumed_plan
from launcher.plan.schema import Plan
from launcher.plan_file import read_plan
from launcher.run_dir import MANIFEST, RunDir, write_manifest
from launcher.runs.planning import lint_ds_config
from tests.unit.inputs import (
    command,
    data_facts,
    format_1_hash,
    in_format_1,
    job_of,
    machine_facts,
    model_facts,
    plan_of,
    remember,
    write_folder,
)

STEPS = {"train": {"max_steps": 6}}
OTHER_ADAM = {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}}
LOG = {"total_num_steps": 6, "warmup_num_steps": 3, "warmup_max_lr": 1e-5, "warmup_type": "log"}


@pytest.mark.parametrize(
    "own",
    [
        {"optimizer": OTHER_ADAM},
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-5, "momentum": 0.9}}},
        {"optimizer": OTHER_ADAM, "scheduler": {"type": "WarmupDecayLR", "params": LOG}},
        {"scheduler": {"type": "WarmupLR", "params": {**LOG, "total_num_steps": None}}},
        {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}},
    ],
)
def test_values_of_the_json_can_be_planned_again_from_plan_json(own: dict[str, Any]) -> None:
    config = {"zero_optimization": {"stage": 1}, **own}
    params = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in params and params["total_num_steps"] is None:
        del params["total_num_steps"]
    user = from_mapping(config, "ds.json")
    job = job_of(**STEPS, schedule={"allow_unsafe": True})
    facts = (model_facts(), data_facts())
    plan = resolve(plan_inputs(job, user, machine_facts(8)), *facts)
    again = Plan.from_json(plan.to_json()).job
    assert explicit_keys(again) == explicit_keys(job)
    inputs = plan_inputs(again, user, machine_facts(8))
    check_inputs(inputs)
    assert resolve(inputs, *facts) == plan


REFUSED = [
    ({"optimizer": {"type": "Muon", "params": {"lr": 1e-4, "muon_lr": 5e-4}}}, "optimizer.params.muon_lr"),
    ({"optimizer": {"type": "Muon", "params": {"adam_lr": 2e-5}}}, "optimizer.params.adam_lr"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-5, 1e-6]}}}, "scheduler.params.warmup_max_lr"),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {**LOG, "warmup_min_lr": [1e-6, 1e-7]}}},
        "scheduler.params.warmup_min_lr",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": [1e-6, 1e-7], "cycle_max_lr": 1e-5}}},
        "scheduler.params.cycle_min_lr",
    ),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
    ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "zero_optimization.elastic_checkpoint"),
    ({"zero_optimization": {"stage": 3, "elastic_checkpoint": "true"}}, "zero_optimization.elastic_checkpoint"),
]


@pytest.mark.parametrize(("config", "key"), REFUSED)
def test_features_that_the_training_loop_does_not_support_are_errors(config: dict[str, Any], key: str) -> None:
    user = from_mapping({"zero_optimization": {"stage": 2}, **config}, "ds.json")
    with pytest.raises(RequestError) as caught:
        lint_ds_config(plan_inputs(job_of(**STEPS), user, machine_facts(8)))
    assert [(problem.file, problem.key) for problem in caught.value.problems] == [("ds.json", key)]
    assert caught.value.problems[0].hint


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-5, "momentum": 0.9}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {**LOG, "warmup_min_lr": [0.0, 0.0]}}},
        {"managed_gradient_accumulation": True, "checkpoint": {"load_universal": True}},
        {"zero_optimization": {"stage": 2, "elastic_checkpoint": False}},
    ],
)
def test_values_that_are_equal_for_all_parameter_groups_are_planned(config: dict[str, Any]) -> None:
    user = from_mapping({"zero_optimization": {"stage": 2}, **config}, "ds.json")
    lint_ds_config(plan_inputs(job_of(**STEPS, schedule={"allow_unsafe": True}), user, machine_facts(8)))


def test_lists_in_a_scheduler_that_a_generated_one_replaces_are_ignored() -> None:
    user = from_mapping({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-5, 1e-6]}}}, "ds.json")
    lint_ds_config(plan_inputs(job_of(**STEPS, schedule={"shape": "linear"}), user, machine_facts(8)))


def test_load_universal_of_the_json_is_reported_as_not_used() -> None:
    plan = saved_with({"checkpoint": {"load_universal": True}})
    assert any("checkpoint.load_universal" in warning for warning in plan.warnings)
    assert not any("checkpoint.load_universal" in warning for warning in saved_with({}).warnings)


def saved_with(config: dict[str, Any]) -> Plan:
    return plan_of(job_of(**STEPS, schedule={"peak_lr": 1e-5}), user={"zero_optimization": {"stage": 2}, **config})


def resumed_with(batch: int, **train: Any) -> str:
    """The arithmetic of a run with batches of 64 that is resumed with another batch."""
    plans = [
        plan_of(job_of(train={"num_train_epochs": 3, **keys}, schedule={"peak_lr": 1e-5}))
        for keys in ({"train_batch_size": 64}, {"train_batch_size": batch, **train})
    ]
    plan = resumed_plan(*plans, update=10, samples=640, new_schedule=False)
    assert plan.resumed is not None
    assert plan.ds_config["optimizer"]["params"]["betas"] == list(train.get("betas", (0.9, 0.999)))
    return plan.resumed.arithmetic


def test_another_batch_comes_with_the_beta2_that_suits_it_but_does_not_change_it() -> None:
    assert "beta2 stays 0.999: with 0.998001 = 0.999^(128/64) in train.betas" in resumed_with(128)
    assert "with 0.9995 = 0.999^(32/64) in train.betas" in resumed_with(32)
    assert "beta2" not in resumed_with(64)
    assert "beta2" not in resumed_with(128, betas=(0.9, 0.998))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adamw"])
def test_adam_states_are_converted_for_another_number_of_ranks(kind: str) -> None:
    plan = saved_with({"optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert must_convert(plan, 8, 4)
    assert not must_convert(plan, 8, 8)


@pytest.mark.parametrize("kind", ["SGD", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Lion", "Lamb", "Muon"])
def test_states_of_other_optimizers_cannot_be_converted(kind: str) -> None:
    plan = saved_with({"optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert not must_convert(plan, 8, 8)
    with pytest.raises(RequestError, match=f"for 4: the optimizer is {kind}") as caught:
        must_convert(plan, 8, 4)
    assert "resume on 8 ranks" in str(caught.value.problems[0].hint)
    whole = saved_with({"zero_optimization": {"stage": 0}, "optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert not must_convert(whole, 8, 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "amsgrad": True}}}, "amsgrad"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "NVMe",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
    ],
)
def test_states_that_the_converter_drops_are_an_error(config: dict[str, Any], words: str) -> None:
    plan = saved_with(config)
    with pytest.raises(RequestError, match=words):
        must_convert(plan, 8, 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"optimizer": {"type": "SGD", "params": {"lr": 1e-5}}},
            "the optimizer states of AdamW, but the resumed run uses SGD",
        ),
        ({"zero_optimization": {"stage": 3}}, "saved with ZeRO-2, and ZeRO-3 cannot load it"),
        ({"zero_optimization": {"stage": 0}}, "saved with ZeRO-2, and ZeRO-0 cannot load it"),
    ],
)
def test_states_of_another_kind_are_an_error(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_same_kind_of_state(saved_with({}), saved_with(config))
    for same in ({"zero_optimization": {"stage": 1}}, {"optimizer": {"type": "Adam", "params": {"lr": 1e-5}}}):
        check_same_kind_of_state(saved_with({}), saved_with(same))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (0, 3), (2, 0), (3, 0), (2, 3), (3, 1)])
def test_a_stage_with_other_shards_is_an_error_on_any_number_of_ranks(before: int, after: int) -> None:
    old, new = (saved_with({"zero_optimization": {"stage": stage}}) for stage in (before, after))
    fewer = new.model_copy(update={"world": new.world.model_copy(update={"processes_per_node": 4})})
    with pytest.raises(RequestError, match=f"saved with ZeRO-{before}, and ZeRO-{after} cannot load it"):
        check_same_kind_of_state(old, fewer)


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [
        ({}, 8),
        ({"nodes": 2}, 16),
        ({"nodes": 2, "gpus_per_node": 4}, 8),
        ({"gpus_per_node": 0, "processes_per_node": 3}, 3),
        ({"gpus_per_node": 0}, None),
    ],
)
def test_expected_ranks_of_a_resume(cluster: dict[str, Any], ranks: int | None) -> None:
    assert expected_ranks(saved_with({}), job_of(cluster=cluster).cluster) == ranks


def a_run(folder: Path, optimizer: dict[str, Any]) -> RunDir:
    """A run of job.yaml with the optimizer and log scheduler of its JSON, stopped after update 2."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}, "optimizer": optimizer}
    config["zero_allow_untested_optimizer"] = True
    config["scheduler"] = {"type": "WarmupDecayLR", "params": LOG}
    (folder / "ds.json").write_text(json.dumps(config))
    overrides = ("train.max_steps=6", "deepspeed=ds.json", "schedule.allow_unsafe=true")
    remember(folder / "job.yaml", overrides, model_facts(), data_facts())
    text = command("plan", "job.yaml", "--json", *overrides).out
    run = RunDir.create(folder / "runs", "tiny")
    run.plan_file.write_text(text)
    run.checkpoint(2).mkdir()
    write_manifest(run.checkpoint(2), update=2, samples=64, world_size=4, plan_sha256=Plan.from_json(text).sha256)
    return run


def test_a_run_with_a_json_is_resumed_on_more_nodes(tmp_path: Path, monkeypatch: Any) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path, OTHER_ADAM)
    ended = command("submit", "--to", "slurm", "--dry-run", "--resume", str(run.path), "cluster.nodes=2")
    assert (ended.status, ended.err.count("but train.weight_decay")) == (0, 0), ended.err
    assert "#SBATCH --nodes=2" in ended.out


def test_a_run_planned_in_the_old_format_is_resumed(tmp_path: Path, monkeypatch: Any) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path, OTHER_ADAM)
    plan = in_format_1(read_plan(run.plan_file))["plan"]
    del plan["job"]["train"]["eval_every"]  # as if a later version added the key
    recorded = format_1_hash(plan)
    run.plan_file.write_text(json.dumps({"sha256": recorded, "plan": plan}))
    (run.checkpoint(2) / MANIFEST).unlink()
    write_manifest(run.checkpoint(2), update=2, samples=64, world_size=4, plan_sha256=recorded)
    ended = command("submit", "--to", "slurm", "--dry-run", "--resume", str(run.path), "cluster.nodes=2")
    assert ended.status == 0, ended.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.nodes=2", "saved on 4 ranks and cannot be converted for 8: the optimizer is NAdam"),
        ("train.weight_decay=0.3", "train.weight_decay"),
    ],
)
def test_the_error_of_a_resume_names_its_cause(tmp_path: Path, monkeypatch: Any, override: str, words: str) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path, {"type": "NAdam", "params": {"lr": 1e-5, "weight_decay": 0.1}})
    ended = command("submit", "--to", "slurm", "--dry-run", "--resume", str(run.path), override)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert "this is a folder" not in ended.err
