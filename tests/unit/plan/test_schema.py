"""A plan as JSON: its hash, the keys that were set, earlier formats, and damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import LauncherError
from launcher.job import Job, explicit_keys, validate_job
from launcher.job.set_keys import changed_keys, set_keys, with_set_keys
from launcher.plan.schema import Plan, hash_in
from tests.unit.inputs import data_facts, in_format_1, job_of, machine_facts, plan_of

PLANS = Path(__file__).parents[2] / "data/plans"
"""plan.json as earlier versions of the launcher wrote it."""

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
    if workload["model"] is not None:
        assert workload["model"].pop("chunked_loss") is False
        assert workload["model"].pop("packed_attention") == []
        assert [workload["model"].pop(name) for name in ("flops_per_token", "flops_per_pair")] == [0.0, 0.0]
    if name == "training":
        assert workload["data"]["train"].pop("bins") == 0
    assert {key: workload[key] for key in moved if key != "job"} == {key: moved[key] for key in moved if key != "job"}
    for key, value in old["job"].items():
        found = workload["job"][key]
        # Sections may have keys of later versions.
        assert ({name: found[name] for name in value} if isinstance(value, dict) else found) == value
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
