"""Planning: lengths, ranks, the content of the plan, and its hash."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.ds_config import from_mapping
from launcher.errors import LauncherError, RequestError
from launcher.job import Job, explicit_keys, validate_job
from launcher.job.set_keys import changed_keys, set_keys, with_set_keys
from launcher.plan.inputs import plan_inputs
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.length import length_warnings, resolve_length
from launcher.plan.resolve import resolve
from launcher.plan.schema import Plan, hash_in
from tests.unit.inputs import GIB, data_facts, in_format_1, job_of, machine_facts, model_facts, plan_of

EPOCHS = st.one_of(st.none(), st.floats(0.01, 20.0))

PLANS = Path(__file__).parents[2] / "data/plans"
"""plan.json as earlier versions of the launcher wrote it."""


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


JOBS = st.builds(
    lambda steps, batch, seed, shape, eps: job_of(
        train={"max_steps": steps, "train_batch_size": 8 * batch, "seed": seed, "eps": eps},
        schedule={"shape": shape, "warmup": 1},
    ),
    st.integers(3, 5),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["linear", "cosine", "constant", "wsd"]),
    st.floats(1e-12, 1e-3),
)


@settings(max_examples=60, deadline=None)
@given(one=JOBS, other=JOBS)
def test_hashes_are_equal_if_and_only_if_plans_are(one: Job, other: Job) -> None:
    first, second = plan_of(one), plan_of(other)
    assert (first.sha256 == second.sha256) == (first == second) == (one == other)
    assert plan_of(one).sha256 == first.sha256


@settings(max_examples=60, deadline=None)
@given(job=JOBS)
def test_a_plan_is_read_back_from_its_json(job: Job) -> None:
    plan = plan_of(job)
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.sha256 == plan.sha256
    assert back.to_json() == plan.to_json()


SEGMENTS = [{"kind": "constant", "until": 100, "to": 1.0}, {"kind": "linear", "until": 1.0, "to": 0.0}]


@pytest.mark.parametrize(
    "job",
    [
        job_of(train={"max_steps": 200}, schedule={"shape": "compound", "segments": SEGMENTS}),
        job_of(train={"max_steps": 200}, schedule={"shape": "step", "decay_at": [0.5, 150]}),
        job_of(train={"max_steps": 200}, data={"eval": "2e-2"}, schedule={"warmup": "3%"}),
    ],
)
def test_whole_numbers_and_fractions_are_preserved(job: Job) -> None:
    plan = plan_of(job)
    assert Plan.from_json(plan.to_json()) == plan


WITH_PEFT = machine_facts(8, versions={"deepspeed": "0.19.8", "peft": "0.18"})
EXPLICIT = [
    job_of(train={"max_steps": 9}),
    job_of(train={"max_steps": 9, "weight_decay": 0.0, "betas": [0.9, 0.999]}, schedule={"warmup_type": "linear"}),
    job_of(train={"max_steps": 9, "train_batch_size": "auto"}, schedule={"shape": "auto"}, cluster={"env": {}}),
    job_of(model={"lora": {}}, data={"eval": None}, checkpoint={"every": None, "keep": 2}),
    job_of(model={"lora": {"r": 4}}, schedule={"shape": "compound", "segments": SEGMENTS}, train={"max_steps": 200}),
    job_of(model={"freeze": []}, deepspeed={"zero_optimization": {"stage": 2}}, export=True),
]


@pytest.mark.parametrize("job", EXPLICIT)
def test_a_plan_stores_which_keys_were_set(job: Job) -> None:
    plan = plan_of(job, machine=WITH_PEFT)
    back = Plan.from_json(plan.to_json())
    assert explicit_keys(back.job) == explicit_keys(job)
    assert back.job.model_dump(mode="json", exclude_unset=True) == job.model_dump(mode="json", exclude_unset=True)
    assert validate_job(back.job.model_dump(mode="json", exclude_unset=True)) == job


def test_in_a_plan_in_the_old_format_keys_that_differ_from_the_defaults_are_set() -> None:
    job = job_of(train={"max_steps": 9, "weight_decay": 0.1, "eps": 1e-8}, model={"lora": {}})
    plan = plan_of(job, machine=WITH_PEFT)
    back = Plan.from_json(json.dumps(in_format_1(plan)))
    assert back == plan
    names = {"name", "model.name_or_path", "data.train", "train.max_steps", "train.weight_decay"}
    assert explicit_keys(back.job) == names
    assert back.job.model_fields_set == {"name", "model", "data", "train"}
    assert "lora" in back.job.model.model_fields_set


def test_a_plan_without_a_newer_key_of_the_job_is_read_and_keeps_its_hash() -> None:
    document = in_format_1(plan_of(job_of(train={"max_steps": 9})))
    del document["plan"]["job"]["train"]["eval_every"]
    text = json.dumps(document)
    with pytest.raises(LauncherError, match="was changed"):
        Plan.from_json(text)
    document["sha256"] = hashlib.sha256(
        json.dumps(document["plan"], sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    text = json.dumps(document)
    assert Plan.from_json(text).job.train.eval_every is None
    assert hash_in(text) == document["sha256"]


@pytest.mark.parametrize("name", ["training", "script"])
def test_a_plan_of_an_earlier_version_is_read(name: str) -> None:
    text = (PLANS / f"{name}-format-2.json").read_text()
    old = json.loads(text)["plan"]
    plan = Plan.from_json(text)
    assert plan.workload.kind == name
    assert hash_in(text) != plan.sha256
    written = json.loads(plan.to_json())["plan"]
    workload = written.pop("workload")
    moved = {key: old[key] for key in ("job", "model") if key in old}
    moved |= old["script"] if name == "script" else {key: old[key] for key in ("data", "memory", "recommendation")}
    assert {key: workload[key] for key in moved if key != "job"} == {key: moved[key] for key in moved if key != "job"}
    assert {key: workload["job"][key] for key in old["job"]} == old["job"]
    assert {key: written[key] for key in written} == {key: old[key] for key in written}
    with pytest.raises(LauncherError, match="was changed"):
        Plan.from_json(text.replace('"zero_stage": 2', '"zero_stage": 1'))


def test_the_hash_depends_on_the_format() -> None:
    document = json.loads(plan_of().to_json())
    with pytest.raises(LauncherError, match="damaged"):
        Plan.from_json(json.dumps({**document, "format": 2}))


def test_a_plan_in_a_newer_format_is_an_error() -> None:
    document = json.loads(plan_of(job_of(train={"max_steps": 9})).to_json())
    with pytest.raises(LauncherError, match="it has format 4, but this launcher reads formats 1 to 3"):
        Plan.from_json(json.dumps({**document, "format": 4}))


def test_set_keys_are_marked_and_unknown_keys_are_an_error() -> None:
    job = job_of(train={"max_steps": 9, "seed": 42})
    assert "train.seed" in set_keys(job)
    assert "train.seed" not in changed_keys(job)
    assert set_keys(with_set_keys(job, ["train", "train.seed"])) == ["train", "train.seed"]
    with pytest.raises(ValueError, match=r"no key train\.sed"):
        with_set_keys(job, ["train.sed"])


def leaves(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [path for key, value in inner for path in leaves(value, (*at, key))]
    return found or [at]


def with_changed_value(document: dict[str, Any], path: tuple[Any, ...]) -> str:
    copied = json.loads(json.dumps(document))
    node = copied
    for key in path[:-1]:
        node = node[key]
    before = node[path[-1]]
    numbers = {bool: lambda: not before, int: lambda: before + 1, float: lambda: before + 0.5}
    node[path[-1]] = numbers.get(type(before), lambda: f"{before}x")()
    return json.dumps(copied)


def test_a_change_anywhere_in_a_plan_is_detected() -> None:
    document = json.loads(plan_of(job_of(train={"max_steps": 9}), data=data_facts(50, evaluated=5)).to_json())
    paths = leaves(document)
    assert len(paths) > 150
    for path in paths:
        with pytest.raises(LauncherError, match=r"changed|damaged"):
            Plan.from_json(with_changed_value(document, path))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": "0"}', '{"sha256": "0", "plan": {}}', "null"])
def test_a_damaged_plan_is_an_error(text: str) -> None:
    with pytest.raises(LauncherError, match=r"plan\.json is damaged"):
        Plan.from_json(text)


def test_half_a_plan_is_an_error() -> None:
    text = plan_of().to_json()
    with pytest.raises(LauncherError, match="damaged"):
        Plan.from_json(text[: len(text) // 2])
