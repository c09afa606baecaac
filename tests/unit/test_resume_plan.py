"""Planning a resume: what the JSON says for itself, what the loop does not carry out, and what can be converted."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.job import explicit_keys
from launcher.plan.convert import must_convert
from launcher.plan.model import Plan
from launcher.plan.resolve import check_request, resolve
from tests.unit.given import data_facts, job_of, machine_facts, model_facts, plan_of

STEPS = {"train": {"max_steps": 6}}
ADAM_OF_ITS_OWN = {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}}
LOG = {"total_num_steps": 6, "warmup_num_steps": 3, "warmup_max_lr": 1e-5, "warmup_type": "log"}


@pytest.mark.parametrize(
    "own",
    [
        {"optimizer": ADAM_OF_ITS_OWN},
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-5, "momentum": 0.9}}},
        {"optimizer": ADAM_OF_ITS_OWN, "scheduler": {"type": "WarmupDecayLR", "params": LOG}},
        {"scheduler": {"type": "WarmupLR", "params": {**LOG, "total_num_steps": None}}},
        {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}},
    ],
)
def test_what_the_json_says_for_itself_can_be_planned_again_from_plan_json(own: dict[str, Any]) -> None:
    config = {"zero_optimization": {"stage": 1}, **own}
    params = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in params and params["total_num_steps"] is None:
        del params["total_num_steps"]
    user = from_mapping(config, "ds.json")
    job = job_of(**STEPS, schedule={"allow_unsafe": True})
    facts = (model_facts(), data_facts(), machine_facts(8))
    plan = resolve(job, user, *facts)
    again = Plan.from_json(plan.to_json()).job
    assert explicit_keys(again) == explicit_keys(job)
    check_request(again, user, machine_facts(8))
    assert resolve(again, user, *facts) == plan


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
def test_what_the_loop_does_not_carry_out_is_refused_before_a_run(config: dict[str, Any], key: str) -> None:
    user = from_mapping({"zero_optimization": {"stage": 2}, **config}, "ds.json")
    with pytest.raises(RequestError) as refused:
        check_request(job_of(**STEPS), user, machine_facts(8))
    assert [(problem.file, problem.key) for problem in refused.value.problems] == [("ds.json", key)]
    assert refused.value.problems[0].hint


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-5, "momentum": 0.9}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {**LOG, "warmup_min_lr": [0.0, 0.0]}}},
        {"managed_gradient_accumulation": True, "checkpoint": {"load_universal": True}},
        {"zero_optimization": {"stage": 2, "elastic_checkpoint": False}},
    ],
)
def test_what_is_the_same_for_every_group_is_planned(config: dict[str, Any]) -> None:
    user = from_mapping({"zero_optimization": {"stage": 2}, **config}, "ds.json")
    check_request(job_of(**STEPS, schedule={"allow_unsafe": True}), user, machine_facts(8))


def test_lists_in_a_scheduler_that_a_generated_one_replaces_do_not_count() -> None:
    user = from_mapping({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-5, 1e-6]}}}, "ds.json")
    check_request(job_of(**STEPS, schedule={"shape": "linear"}), user, machine_facts(8))


def saved_with(config: dict[str, Any]) -> Plan:
    return plan_of(job_of(**STEPS, schedule={"peak_lr": 1e-5}), user={"zero_optimization": {"stage": 2}, **config})


def on_four(plan: Plan) -> Plan:
    return plan.model_copy(update={"world": plan.world.model_copy(update={"processes_per_node": 4})})


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adamw"])
def test_adams_states_are_converted_for_another_number_of_ranks(kind: str) -> None:
    plan = saved_with({"optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert must_convert(plan, 8, on_four(plan))
    assert not must_convert(plan, 8, plan)


@pytest.mark.parametrize("kind", ["SGD", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Lion", "Lamb", "Muon"])
def test_other_states_are_refused_by_the_optimizers_name_where_the_ranks_change(kind: str) -> None:
    plan = saved_with({"optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert not must_convert(plan, 8, plan)
    with pytest.raises(RequestError, match=f"for 4: the optimizer is {kind}") as refused:
        must_convert(plan, 8, on_four(plan))
    assert "resume on 8 ranks" in str(refused.value.problems[0].hint)
    whole = saved_with({"zero_optimization": {"stage": 0}, "optimizer": {"type": kind, "params": {"lr": 1e-5}}})
    assert not must_convert(whole, 8, on_four(whole))


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
def test_states_that_the_converter_does_not_keep_are_refused(config: dict[str, Any], words: str) -> None:
    plan = saved_with(config)
    with pytest.raises(RequestError, match=words):
        must_convert(plan, 8, on_four(plan))
