"""Checkpoints written in the background: the memory of their copies, and when training waits instead."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import RequestError
from launcher.plan.schema import Plan
from tests.unit.inputs import GIB, job_of, machine_facts, model_facts, plan_of

PARAMETERS = 8_000_000_000
MODEL = model_facts(parameters=PARAMETERS)
PINNED = 1.5


def planned(stage: int = 2, *, gpus: int = 4, memory_gib: int = 1024, zero: Any = None, **sections: Any) -> Plan:
    job = job_of(**{"checkpoint": {"every": 10}, "train": {"max_steps": 20}, **sections})
    user = {"zero_optimization": {"stage": stage, **(zero or {})}}
    machine = machine_facts(gpus, 1000, memory_bytes=memory_gib * GIB)
    return plan_of(job, user, model=MODEL, machine=machine)


def copied(plan: Plan) -> int | None:
    return plan.training.background_copy_bytes


def noted(plan: Plan) -> list[str]:
    return [warning for warning in plan.warnings if "training waits while a checkpoint is written" in warning]


@pytest.mark.parametrize(
    ("stage", "nodes", "per_parameter"),
    [
        (0, 1, 2 + 12),  # rank 0 saves all
        (1, 1, 2 + 12),  # rank 0 saves the weights, each rank its part of the states
        (2, 2, 2 + 12 / 2),  # half of the ranks are on the first node
        (3, 1, 12),
        (3, 2, 6),
    ],
)
def test_one_copy_of_what_is_saved_on_the_first_node(stage: int, nodes: int, per_parameter: float) -> None:
    plan = planned(stage, cluster={"nodes": nodes}, memory_gib=4096)
    assert plan.precision == "bf16"
    assert copied(plan) == PINNED * per_parameter * PARAMETERS
    assert noted(plan) == []


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 12), (2, 16), (3, 12)])
def test_on_a_cpu_in_float32(stage: int, per_parameter: int) -> None:
    assert copied(planned(stage, gpus=0, memory_gib=4096)) == per_parameter * PARAMETERS


def test_auto_waits_if_the_host_memory_is_not_enough() -> None:
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    roomy, small = (planned(zero=offloaded, memory_gib=memory) for memory in (1024, 300))
    assert copied(roomy) is not None and noted(roomy) == []
    assert copied(small) is None
    (note,) = noted(small)
    assert "about 156.5 GiB of host memory per node" in note and "checkpoint.background: true" in note
    assert roomy.train_micro_batch_size_per_gpu == small.train_micro_batch_size_per_gpu


def test_memory_that_is_too_small_is_reported_if_the_job_asks_for_the_background() -> None:
    checkpoint = {"every": 10, "background": True}
    offloaded = {"offload_optimizer": {"device": "cpu"}}

    def reported(plan: Plan) -> list[str]:
        return [warning for warning in plan.warnings if "of host memory, but the node has" in warning]

    plan = planned(zero=offloaded, memory_gib=300, checkpoint=checkpoint)
    assert copied(plan) == PINNED * 14 * PARAMETERS
    assert len(reported(plan)) == 1
    assert reported(planned(zero=offloaded, memory_gib=300)) == []
    assert reported(planned(zero=offloaded, memory_gib=1024, checkpoint=checkpoint)) == []


def test_the_job_can_turn_it_off() -> None:
    plan = planned(checkpoint={"every": 10, "background": False})
    assert copied(plan) is None and noted(plan) == []


@pytest.mark.parametrize("checkpoint", [{}, {"background": True}, {"keep_best": 1}])
def test_nothing_is_copied_if_only_the_end_is_saved(checkpoint: dict[str, Any]) -> None:
    plan = planned(checkpoint=checkpoint, data={"eval": "eval.jsonl"})
    assert copied(plan) is None and noted(plan) == []


def test_milestones_are_written_in_the_background_too() -> None:
    assert copied(planned(checkpoint={"keep_every": 10})) is not None


@pytest.mark.parametrize("background", [True, "auto"])
def test_states_on_nvme_are_copied_by_deepspeed(background: Any) -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    plan = planned(3, zero=zero, checkpoint={"every": 10, "background": background})
    assert copied(plan) is None
    assert noted(plan) == ["training waits while a checkpoint is written: DeepSpeed copies the states on NVMe itself"]


def test_without_a_visible_gpu_the_host_memory_is_unknown() -> None:
    plan = planned(gpus=0, cluster={"gpus_per_node": 4})
    assert plan.world.device == "cuda"
    assert copied(plan) is None and len(noted(plan)) == 1


def test_adapters_are_small_but_a_tied_head_is_saved() -> None:
    facts = {"trainable_parameters": 20_000_000, "adapted_modules": ("q_proj",)}
    machine = machine_facts(4, 1000, versions={"deepspeed": "0.19.8", "peft": "0.18"})
    job = job_of(checkpoint={"every": 10}, train={"max_steps": 20}, model={"lora": {}})

    def copy_of(*, tied: bool) -> int | None:
        model = model_facts(**facts, tied_embeddings=tied)
        return copied(plan_of(job, {"zero_optimization": {"stage": 2}}, model=model, machine=machine))

    assert copy_of(tied=False) == PINNED * 14 * 20_000_000
    assert copy_of(tied=True) == PINNED * (14 * 20_000_000 + 2 * 128_256 * 4096)


@pytest.mark.parametrize("value", ["sometimes", 3, None])
def test_a_value_that_is_not_valid(value: Any) -> None:
    with pytest.raises(RequestError, match=r"checkpoint\.background"):
        job_of(checkpoint={"background": value})
