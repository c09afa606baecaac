"""Planning: lengths, ranks, and the content of the plan."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.plan.inputs import plan_inputs
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.length import length_warnings, resolve_length
from launcher.plan.resolve import resolve
from tests.unit.inputs import GIB, data_facts, job_of, machine_facts, model_facts, plan_of

EPOCHS = st.one_of(st.none(), st.floats(0.01, 20.0))


@given(sequences=st.integers(1, 5000), epochs=EPOCHS, batch=st.integers(1, 600))
def test_a_run_has_the_samples_of_all_epochs(sequences: int, epochs: float | None, batch: int) -> None:
    job = job_of(train={"num_train_epochs": epochs} if epochs else {})
    wanted = max(1, round(sequences * (epochs or 1.0)))
    if wanted < batch:
        with pytest.raises(RequestError, match=f"at most {wanted},"):
            resolve_length(job, data_facts(sequences), batch)
        batch = wanted
    length = resolve_length(job, data_facts(sequences), batch)
    assert length.samples == length.total_updates * batch == wanted + length.refilled_samples
    assert 0 <= length.refilled_samples < batch
    assert math.isclose(length.updates_per_epoch * batch, sequences)
    assert math.isclose(length.tokens_per_update, 100 * batch)


@given(sequences=st.integers(1, 5000), steps=st.integers(1, 10_000), batch=st.integers(1, 600))
def test_max_steps_is_the_number_of_updates(sequences: int, steps: int, batch: int) -> None:
    length = resolve_length(job_of(train={"max_steps": steps}), data_facts(sequences), batch)
    assert (length.total_updates, length.samples, length.refilled_samples) == (steps, steps * batch, 0)


def test_a_token_without_an_embedding_is_an_error() -> None:
    job, user = job_of(train={"max_steps": 3}), from_mapping({}, "ds.json")
    model, inputs = model_facts(vocab_size=300), plan_inputs(job, user, machine_facts(1))
    resolve(inputs, model, data_facts(64, largest_token=299))
    with pytest.raises(RequestError, match="token 300, but the model has 300 embeddings") as caught:
        resolve(inputs, model, data_facts(64, largest_token=300))
    assert caught.value.problems[0].key == "model.name_or_path"


def test_warnings_about_rows_and_batches() -> None:
    reasons = {"are empty": 1, "have no assistant turn": 1}
    data = data_facts(10, cut=3, dropped=2, partly_learned=1, dropped_because=reasons, notes=("the template is odd",))
    job = job_of(train={"num_train_epochs": 2}, data={"max_length": 77})
    warnings = "\n".join(length_warnings(job, data, 16, resolve_length(job, data, 16)))
    for words in (
        "filled up with 12 samples",
        "a batch of 16 contains some of the 10",
        "3 of 10 rows are cut at 77",
        "2 of 10 rows have nothing to learn and are skipped: 1 are empty, 1 have no assistant turn",
        "the template is odd",
    ):
        assert words in warnings
    assert "in 1 conversations" in warnings
    assert length_warnings(job, data_facts(8), 16, resolve_length(job, data_facts(8), 16))[0].startswith(
        "a batch of 16"
    )
    assert length_warnings(job, data_facts(32), 16, resolve_length(job, data_facts(32), 16)) == []


@pytest.mark.parametrize(
    ("cluster", "gpus", "world"),
    [
        ({}, 8, (1, 8, "cuda", "nccl")),
        ({"nodes": 3}, 8, (3, 8, "cuda", "nccl")),
        ({"gpus_per_node": 4}, 0, (1, 4, "cuda", "nccl")),
        ({"gpus_per_node": 2, "processes_per_node": 2}, 8, (1, 2, "cuda", "nccl")),
        ({"gpus_per_node": 0}, 8, (1, 1, "cpu", "gloo")),
        ({"processes_per_node": 2}, 0, (1, 2, "cpu", "gloo")),
        ({"processes_per_node": 2}, 8, (1, 8, "cuda", "nccl")),
        ({}, 0, (1, 1, "cpu", "gloo")),
    ],
)
def test_ranks_and_their_device(cluster: dict[str, Any], gpus: int, world: tuple[int, int, str, str]) -> None:
    found = plan_inputs(job_of(cluster=cluster), from_mapping({}, "ds.json"), machine_facts(gpus)).world
    assert (found.nodes, found.processes_per_node, found.device, found.backend) == world
    assert found.size == found.nodes * found.processes_per_node
    assert 1 <= found.threads_per_process <= 64


@pytest.mark.parametrize(
    ("dtype", "user", "machine", "precision"),
    [
        ("auto", {}, machine_facts(8), "bf16"),
        ("auto", {}, machine_facts(8, bf16=False), "fp16"),
        ("auto", {}, machine_facts(0), "fp32"),
        ("auto", {"fp16": {"enabled": True}}, machine_facts(8), "fp16"),
        ("float32", {}, machine_facts(8), "fp32"),
        ("bfloat16", {"bf16": {"enabled": True}}, machine_facts(0), "bf16"),
    ],
)
def test_precision(dtype: str, user: dict[str, Any], machine: Any, precision: str) -> None:
    job = job_of(model={"dtype": dtype})
    assert plan_inputs(job, from_mapping(user, "ds.json"), machine).precision == precision


def test_the_parts_of_a_plan_agree() -> None:
    job = job_of(
        train={"max_steps": 1000, "train_batch_size": 128},
        schedule={"shape": "linear", "peak_lr": 2e-5, "warmup": 100},
        data={"eval": 0.1},
    )
    plan = plan_of(job, data=data_facts(10_000, evaluated=100), machine=machine_facts(8))
    config = plan.ds_config
    assert "auto" not in json.dumps(config)
    assert (config["train_batch_size"], plan.train_batch_size) == (128, 128)
    assert plan.train_micro_batch_size_per_gpu * plan.gradient_accumulation_steps * plan.world.size == 128
    assert config["scheduler"]["params"]["total_num_steps"] == plan.length.total_updates == 1000
    assert config["optimizer"]["params"]["lr"] == plan.learning_rate.peak_lr == 2e-5
    lr_of = planned_lrs(plan)
    lrs = [lr_of(update) for update in range(1000)]
    assert max(lrs) == lrs[100] == pytest.approx(2e-5)
    assert lrs[0] == pytest.approx(2e-5 / 101)
    assert {change.key for change in plan.ds_config_changes} >= {"optimizer", "scheduler", "train_batch_size"}


def test_the_default_micro_batch_depends_on_the_memory() -> None:
    model, job = model_facts(parameters=500_000_000), job_of(train={"train_batch_size": 256})
    sizes = [
        plan_of(job, model=model, machine=machine_facts(8, gpu_gib=gib)).train_micro_batch_size_per_gpu
        for gib in (8, 80)
    ]
    assert sizes[0] < sizes[1] == 16


def test_the_warning_about_too_little_memory_has_the_numbers() -> None:
    job = job_of(train={"train_micro_batch_size_per_gpu": 1})
    plan = plan_of(job, machine=machine_facts(2, gpu_gib=24))
    need = plan.training.memory["device_total"] / GIB
    assert any(f"about {need:.1f} GiB" in warning and "21.6 GiB" in warning for warning in plan.warnings)
    unseen = plan_of(job_of(cluster={"gpus_per_node": 8}), machine=machine_facts(0))
    (warning,) = (warning for warning in unseen.warnings if "no GPU is visible here" in warning)
    assert "an unset micro-batch is 1" in warning


@pytest.mark.parametrize("gib", [1, 1024])
@pytest.mark.parametrize(("train", "batch"), [({}, 32), ({"train_batch_size": 64}, 64)])
def test_without_a_visible_gpu_the_default_micro_batch_is_one(train: dict[str, int], batch: int, gib: int) -> None:
    """Whatever the memory of the login node."""
    login_node = machine_facts(0, memory_bytes=gib * GIB)
    job = job_of(cluster={"gpus_per_node": 8}, train=train)
    plan = plan_of(job, machine=login_node)
    assert (plan.train_micro_batch_size_per_gpu, plan.train_batch_size) == (1, batch)
    assert not any("GiB" in warning for warning in plan.warnings)
    given = job_of(cluster={"gpus_per_node": 8}, train={**train, "train_micro_batch_size_per_gpu": 4})
    assert plan_of(given, machine=login_node).train_micro_batch_size_per_gpu == 4


def test_a_warning_if_the_run_ends_before_the_first_checkpoint() -> None:
    plan = plan_of(job_of(train={"max_steps": 10}, checkpoint={"every": 50}))
    assert any("checkpoint.every 50 is more than the run's 10 updates" in warning for warning in plan.warnings)


def test_a_warning_if_only_one_checkpoint_is_kept() -> None:
    def warned(**checkpoint: int) -> bool:
        return any("checkpoint.keep is 1" in warning for warning in plan_of(job_of(checkpoint=checkpoint)).warnings)

    assert warned(every=5, keep=1)
    assert not warned(every=5) and not warned(keep=1)


def test_the_best_checkpoint_needs_evaluations() -> None:
    with pytest.raises(RequestError, match="the job has no evaluation data"):
        plan_of(job_of(checkpoint={"keep_best": 1}))
    for every, eval_every, warned in ((10, 5, False), (10, 10, False), (10, 20, True), (10, None, True)):
        job = job_of(
            data={"eval": "eval.jsonl"}, checkpoint={"every": every, "keep_best": 1}, train={"eval_every": eval_every}
        )
        assert any("checkpoint.keep_best" in warning for warning in plan_of(job).warnings) == warned


def test_a_scheduler_of_the_user_is_kept_as_deepspeed_steps_it() -> None:
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-5, "warmup_num_steps": 10, "total_num_steps": 50}
    scheduler = {"type": "WarmupDecayLR", "params": {**params, "warmup_type": "linear"}}
    user = {"scheduler": scheduler, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
    plan = plan_of(job_of(train={"max_steps": 50}), user=user)
    assert plan.ds_config["scheduler"] == scheduler
    assert (plan.learning_rate.schedule, plan.learning_rate.advance) == (None, 0)
    lr_of = planned_lrs(plan)
    assert [lr_of(0), lr_of(1), lr_of(2)] == pytest.approx([0.0, 0.0, 1e-6])

    generated = plan_of(job_of(train={"max_steps": 50}, schedule={"shape": "cosine", "peak_lr": 1e-5}), user=user)
    assert generated.ds_config["scheduler"]["type"] == "WarmupCosineLR"
