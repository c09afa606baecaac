"""lint on what the engine rejects, per device; and that the plan rejects the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.ds_config import from_mapping
from launcher.ds_config.catalogue import Catalogue, load_catalogue
from launcher.ds_config.findings import Finding
from launcher.ds_config.lint import lint
from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS
from launcher.ds_config.target import Device, Target
from launcher.errors import RequestError
from launcher.job import LoadedJob
from launcher.prepare import Prepared
from launcher.prepare.machine import missing_packages
from launcher.runs import planning
from tests.unit.ds_config.failing_jsons import ACCEPTED, OFFLOAD, REJECTED, Row, bf16, optimizer, scheduler, zero
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts, write_folder

WORLD = 2
DEVICES: tuple[Device, ...] = ("cpu", "cuda")


@pytest.fixture(scope="module")
def keys() -> Catalogue:
    return load_catalogue()


def found_in(config: dict[str, Any], keys: Catalogue, device: Device = "cuda", **target: Any) -> list[Finding]:
    where = {"world_size": WORLD, "missing": frozenset(MONITORS_AND_OPTIMIZERS), **target}
    return lint(from_mapping(config, "ds.json"), Target(device, **where), keys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", REJECTED, ids=lambda row: row.id)
def test_what_fails_is_an_error_on_the_devices_where_it_fails(row: Row, device: Device, keys: Catalogue) -> None:
    errors = [one for one in found_in(row.config, keys, device) if one.severity == "error"]
    assert [one.key_path for one in errors] == ([row.key] if device in row.where else [])
    for one in errors:
        assert all(words in f"{one.message} {one.hint}" for words in row.words), one


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", ACCEPTED, ids=json.dumps)
def test_what_runs_is_not_an_error(config: dict[str, Any], device: Device, keys: Catalogue) -> None:
    assert [one for one in found_in(config, keys, device) if one.severity == "error"] == []


NO_EFFECT = [
    ({"activation_checkpointing": {"partition_activations": True}}, "model.gradient_checkpointing"),
    ({"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}, "data loader"),
    ({"data_efficiency": {"data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}}, "layers"),
    ({"autotuning": {"enabled": True}}, "only the deepspeed command"),
    ({**zero(2, zenflow={}, **OFFLOAD), **optimizer(), **bf16()}, "update_interval"),
]


@pytest.mark.parametrize(("config", "words"), NO_EFFECT)
def test_a_block_with_no_effect_or_an_unexpected_one_is_a_warning(
    config: dict[str, Any], words: str, keys: Catalogue
) -> None:
    (found,) = found_in(config, keys)
    assert (found.severity, found.key_path.partition(".")[0]) == ("warning", next(iter(config)))
    assert words in f"{found.message} {found.hint}"


@pytest.mark.parametrize("name", ["activation_checkpointing", "data_efficiency", "autotuning"])
def test_a_block_that_is_off_is_not_mentioned(name: str, keys: Catalogue) -> None:
    assert found_in({name: {"enabled": False}} if name != "activation_checkpointing" else {name: {}}, keys) == []


@pytest.mark.parametrize(
    ("name", "severity"),
    [
        ("gradient_cliping", "error"),
        ("learning_rate", "error"),
        ("overlap_comm", "error"),
        ("comms_config", "warning"),
        ("optimiser_type", "warning"),
        ("nothing_like_it", "warning"),
    ],
)
def test_an_ignored_key_is_an_error_only_if_it_is_clearly_a_mistake(name: str, severity: str, keys: Catalogue) -> None:
    assert [one.severity for one in found_in({name: 1}, keys)] == [severity]


def test_the_users_script_is_not_limited_to_the_launchers_loop(keys: Catalogue) -> None:
    for config in (
        {"pipeline": {"stages": 2}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"managed_gradient_accumulation": False},
        scheduler("WarmupLR", warmup_type="linear", warmup_num_steps=2, warmup_max_lr=[1e-5, 1e-6]),
    ):
        assert [one.severity for one in found_in(config, keys)] == ["error"]
        assert found_in(config, keys, script=True) == []


@pytest.mark.parametrize(("group", "world", "valid"), [(8, 16, True), (8, 2, True), (8, 12, False), (2, 3, False)])
def test_hpz_is_limited_to_the_world_size_and_must_divide_it(
    group: int, world: int, valid: bool, keys: Catalogue
) -> None:
    found = found_in(zero(3, zero_hpz_partition_size=group), keys, world_size=world)
    assert [one.key_path for one in found] == ([] if valid else ["zero_optimization.zero_hpz_partition_size"])


def test_the_job_decides_the_precision_of_the_weights(keys: Catalogue) -> None:
    config = {**zero(0), "data_types": {"grad_accum_dtype": "bf16"}}
    assert found_in(config, keys, dtype=None) == found_in(config, keys, dtype="bf16") == []
    assert [one.severity for one in found_in(config, keys, dtype="fp32")] == ["error"]


@pytest.fixture
def plan_rejection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The error of `launcher plan` for a JSON on two ranks of a device; empty if it makes the plan."""
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = model_facts(parameters=10_000_000)
    monkeypatch.setattr(planning, "prepare", lambda *_: Prepared(model=small, data=data_facts()))

    def rejection(config: dict[str, Any], device: Device, **sections: Any) -> str:
        gpus = 0 if device == "cpu" else WORLD
        cluster = {"gpus_per_node": gpus, "processes_per_node": WORLD}
        train = {"max_steps": 20}
        data = {"train": "data/train.jsonl"}
        job = job_of(deepspeed=config, cluster=cluster, train=train, data=data, **sections)
        try:
            planning.make_plan(planning.check_job(LoadedJob(job, "job.yaml"), machine_facts(gpus)))
        except RequestError as error:
            return str(error)
        return ""

    return rejection


@pytest.mark.parametrize("device", DEVICES)
def test_the_plan_rejects_what_lint_rejects_for_its_world_and_device(
    device: Device, plan_rejection: Callable[..., str], keys: Catalogue
) -> None:
    """And the reverse: neither accepts what the other rejects."""
    missing = missing_packages(MONITORS_AND_OPTIMIZERS)
    dtype = "fp32" if device == "cpu" else None
    differ = []
    for config in [*(row.config for row in REJECTED), *ACCEPTED]:
        found = found_in(config, keys, device, missing=missing, dtype=dtype)
        errors = [one for one in found if one.severity == "error"]
        rejected = plan_rejection(config, device)
        if bool(errors) != bool(rejected):
            differ.append((config, errors, rejected))
    assert differ == []


def test_the_plan_rejects_what_its_own_values_make_invalid(plan_rejection: Callable[..., str]) -> None:
    """lint does not know the job's precision; the plan does."""
    config = {**zero(0), "data_types": {"grad_accum_dtype": "fp32"}, **optimizer()}
    assert plan_rejection(config, "cpu") == ""
    model = {"name_or_path": "model", "dtype": "bfloat16"}
    assert "data_types.grad_accum_dtype: fp32 with bf16 weights fails" in plan_rejection(config, "cpu", model=model)
