"""Completing a DeepSpeed JSON: what is filled, kept and rejected, and that every change is recorded."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.ds_config import (
    Decisions,
    Offload,
    batch_keys,
    clipping_of,
    compose,
    from_mapping,
    offload,
    optimizer_of,
    precision_of,
    scheduler_of,
    zero_stage,
)
from launcher.errors import RequestError

SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "total_num_steps": 100,
        "warmup_num_steps": 10,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 1e-5,
        "warmup_type": "linear",
    },
}
DECISIONS = Decisions(
    train_batch_size=32,
    train_micro_batch_size_per_gpu=2,
    gradient_accumulation_steps=8,
    precision="bf16",
    device="cuda",
    optimizer={
        "type": "AdamW",
        "params": {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    },
    scheduler=SCHEDULER,
    gradient_clipping=1.0,
    hidden_size=100,
    total_num_steps=100,
    warmup_num_steps=10,
)


def composed(data: dict[str, Any], *explicit: str, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config, and the changes by key path."""
    decisions = dataclasses.replace(DECISIONS, explicit=frozenset(explicit), **changed)
    result = compose(from_mapping(data, "ds.json"), decisions)
    return result.config, {change.key_path: change for change in result.changes}


def rejected(data: dict[str, Any], *explicit: str, **changed: Any) -> str:
    with pytest.raises(RequestError) as caught:
        composed(data, *explicit, **changed)
    return str(caught.value)


def test_an_empty_json_is_completed_and_every_change_is_recorded() -> None:
    config, changes = composed({})
    assert config == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": DECISIONS.optimizer,
        "scheduler": SCHEDULER,
    }
    assert {path.split(".")[0] for path in changes} == set(config)


def test_what_the_user_wrote_is_kept() -> None:
    written = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "wandb": {"enabled": True},
        "my_own": [1, 2],
    }
    config, changes = composed(copy.deepcopy(written))
    assert {key: config[key] for key in written} == written
    assert not set(changes) & {"train_micro_batch_size_per_gpu", "bf16.enabled", "zero_optimization.stage"}


def test_auto_is_filled_everywhere() -> None:
    config, changes = composed(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "amsgrad": True}},
            "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(SCHEDULER["params"], "auto")},
        }
    )
    assert config["train_batch_size"] == 32
    assert config["fp16"] == {"enabled": False, "loss_scale": 0}
    assert config["bf16"] == {"enabled": True}
    assert config["optimizer"]["params"]["lr"] == 1e-5
    assert config["optimizer"]["params"]["amsgrad"] is True
    assert config["scheduler"] == SCHEDULER
    assert changes["train_batch_size"].before == "auto"


def test_bucket_sizes_follow_the_hidden_size_as_in_transformers() -> None:
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    config, changes = composed({"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}})
    assert [config["zero_optimization"][key] for key in keys] == [10000, 9000, 1000]
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert changes["zero_optimization.reduce_bucket_size"].reason == "hidden size squared"


def test_booleans_are_read_as_deepspeed_reads_them() -> None:
    config, changes = composed({"fp16": {"enabled": "true"}})
    assert (config["fp16"], "bf16" in config) == ({"enabled": True}, False)
    assert changes["fp16.enabled"].before == "true"
    config, _ = composed({"bf16": {"enabled": "false"}, "fp16": {"enabled": 0}}, precision="fp32")
    assert (config["bf16"], config["fp16"]) == ({"enabled": False}, {"enabled": False})
    config, _ = composed({"bf16": "auto", "fp16": "auto"})
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})


def test_a_zero_3_key_keeps_the_name_that_the_user_wrote() -> None:
    """DeepSpeed rejects a key under both names."""
    names = ("gather_16bit_weights_on_model_save", "prefetch_bucket_size", "param_persistence_threshold")
    config, _ = composed({"zero_optimization": {"stage": 3, **dict.fromkeys(names, "auto")}})
    assert config["zero_optimization"] == {"stage": 3, **dict(zip(names, (True, 9000, 1000), strict=True))}
    config, changes = composed({"zero_optimization": {"stage": 3, names[0]: False}})
    assert config["zero_optimization"] == {"stage": 3, names[0]: False}
    assert not [path for path in changes if path.startswith("zero")]


def test_params_auto_is_filled_as_a_whole() -> None:
    blocks = {"optimizer": {"type": "Adam", "params": "auto"}, "scheduler": {"type": "WarmupDecayLR", "params": "auto"}}
    config, changes = composed(copy.deepcopy(blocks))
    assert config["optimizer"] == {"type": "Adam", "params": DECISIONS.optimizer["params"]}
    assert config["scheduler"] == SCHEDULER
    assert changes["scheduler.params"].before == "auto"
    config, _ = composed({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.95]}}})
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.95]


def test_the_start_of_an_auto_schedule_may_be_written_out() -> None:
    params = {**dict.fromkeys(SCHEDULER["params"], "auto"), "warmup_min_lr": 0, "last_batch_iteration": -1}
    generated = {**SCHEDULER, "params": {**SCHEDULER["params"], "warmup_min_lr": 1e-6}}
    config, changes = composed({"scheduler": {"type": "WarmupDecayLR", "params": params}}, scheduler=generated)
    assert config["scheduler"]["params"] == {**generated["params"], "last_batch_iteration": -1}
    assert "no update has a learning rate of 0" in changes["scheduler.params.warmup_min_lr"].reason


def test_a_bucket_size_needs_a_hidden_size() -> None:
    words = rejected({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, hidden_size=None)
    assert "zero_optimization.reduce_bucket_size" in words
    assert "hidden size" in words


def test_numbers_as_text_are_converted_and_recorded() -> None:
    config, changes = composed(
        {
            "train_micro_batch_size_per_gpu": "2",
            "steps_per_print": "50",
            "optimizer": {"type": "AdamW", "params": {"lr": "1e-5"}},
        }
    )
    assert (config["train_micro_batch_size_per_gpu"], config["steps_per_print"]) == (2, 50)
    assert config["optimizer"]["params"]["lr"] == 1e-5
    assert changes["optimizer.params.lr"].before == "1e-5"


FULL_SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}}


def test_a_full_scheduler_is_kept() -> None:
    config, changes = composed({"scheduler": FULL_SCHEDULER})
    assert config["scheduler"] == FULL_SCHEDULER
    assert not [path for path in changes if path.startswith("scheduler")]


def test_a_full_scheduler_is_replaced_if_the_job_sets_a_generated_one() -> None:
    config, changes = composed({"scheduler": FULL_SCHEDULER}, "schedule.shape")
    assert config["scheduler"] == SCHEDULER
    assert changes["scheduler"].before == FULL_SCHEDULER
    config, changes = composed({"scheduler": FULL_SCHEDULER}, "schedule.shape", scheduler=None)
    assert "scheduler" not in config
    assert changes["scheduler"].after is None


def test_on_a_cpu_pytorchs_adam_is_used_with_a_reason() -> None:
    config, changes = composed({"zero_optimization": {"stage": 2}}, device="cpu")
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert "CPU" in changes["optimizer.params.torch_adam"].reason
    config, _ = composed({"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}, device="cpu")
    assert config["optimizer"]["params"]["torch_adam"] is False


def test_offload_is_unchanged_on_a_cpu() -> None:
    block = {"stage": 3, "overlap_comm": True, "offload_param": {"device": "cpu", "pin_memory": True}}
    config, _ = composed({"zero_optimization": dict(block)}, device="cpu")
    assert {key: config["zero_optimization"][key] for key in block} == block


def test_infinite_steps_per_print_becomes_null() -> None:
    """JSON has no infinity, and a plan is JSON."""
    config, changes = composed({"steps_per_print": math.inf})
    assert config["steps_per_print"] is None
    assert changes["steps_per_print"].after is None


def test_clipping_is_not_filled_in_if_the_norm_is_not_computed() -> None:
    """DeepSpeed rejects the combination."""
    zero = {"stage": 2, "compute_grad_norm": False}
    config, changes = composed({"zero_optimization": dict(zero), "gradient_clipping": "auto"})
    assert config["gradient_clipping"] == 0
    assert "not clipped" in changes["gradient_clipping"].reason
    config, _ = composed({"zero_optimization": dict(zero)}, "train.gradient_clipping", gradient_clipping=0.5)
    assert config["gradient_clipping"] == 0.5


def test_explicit_job_values_are_written_for_other_optimizers() -> None:
    """Without a value in the job, the optimizer keeps its defaults."""
    lion = {"optimizer": {"type": "Lion", "params": {"lr": 1e-5}}}
    optimizer = {**DECISIONS.optimizer, "params": {**DECISIONS.optimizer["params"], "weight_decay": 0.3}}
    config, changes = composed(copy.deepcopy(lion), "train.weight_decay", "train.betas", optimizer=optimizer)
    assert config["optimizer"]["params"] == {"lr": 1e-5, "weight_decay": 0.3, "betas": [0.9, 0.999]}
    assert "train.weight_decay" in changes["optimizer.params.weight_decay"].reason
    config, _ = composed(copy.deepcopy(lion), optimizer=optimizer)
    assert config == config | lion


ALL_AUTO = dict.fromkeys(SCHEDULER["params"], "auto")


@pytest.mark.parametrize("block", [{"params": ALL_AUTO}, {"type": "auto", "params": {"warmup_num_steps": "auto"}}, {}])
def test_a_scheduler_without_values_becomes_the_generated_one(block: dict[str, Any]) -> None:
    config, _ = composed({"scheduler": copy.deepcopy(block)})
    assert config["scheduler"] == SCHEDULER
    config, _ = composed({"scheduler": copy.deepcopy(block)}, scheduler=None)
    assert "scheduler" not in config


def test_changes_keep_copies_of_values() -> None:
    config, changes = composed({}, device="cpu")
    assert "torch_adam" in config["optimizer"]["params"]
    assert "torch_adam" not in changes["optimizer"].after["params"]


def test_an_auto_that_cannot_be_filled_is_removed() -> None:
    config, changes = composed({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}, "steps_per_print": "auto"})
    assert config["zero_optimization"] == {"stage": 2}
    assert "steps_per_print" not in config
    assert changes["zero_optimization.overlap_comm"].after is None


@pytest.mark.parametrize(
    ("data", "explicit", "changed", "words"),
    [
        ({"train_batch_size": 64}, "train.train_batch_size", {}, ("train_batch_size", "64", "32")),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train.train_micro_batch_size_per_gpu",
            {},
            ("train.train_micro_batch_size_per_gpu", "4", "2"),
        ),
        ({"train_batch_size": 64}, "", {}, ("64 is not micro-batch 2 x accumulation 8 x world size 2",)),
        ({"fp16": {"enabled": True}}, "model.dtype", {}, ("fp16", "bf16", "model.dtype")),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "", {}, ("both on",)),
        ({"fp16": {"enabled": "1"}, "bf16": {"enabled": "on"}}, "", {}, ("both on",)),
        ({"fp16": {"enabled": True}}, "", {"device": "cpu"}, ("not support fp16 on CPUs",)),
        (
            {"sequence_parallel_size": 2},
            "",
            {"sequence_parallel_size": 1},
            ("found 2", "the job does not set model.sequence_parallel_size"),
        ),
        (
            {"sequence_parallel_size": 2},
            "model.sequence_parallel_size",
            {"sequence_parallel_size": 4},
            ("2 here", "model.sequence_parallel_size in the job is 4"),
        ),
        (
            {"gradient_clipping": 0.5},
            "train.gradient_clipping",
            {},
            ("0.5", "1.0", "train.gradient_clipping"),
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            "schedule.peak_lr",
            {},
            ("optimizer.params.lr", "0.0003", "schedule.peak_lr", "1e-05"),
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}},
            "train.weight_decay",
            {},
            ("0.1", "train.weight_decay"),
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500}}},
            "train.max_steps",
            {},
            ("500", "train.max_steps", "100"),
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": "auto", "x": "auto"}}},
            "",
            {},
            ("optimizer.params.x",),
        ),
        ({"zero_optimization": {"stage": 4}}, "", {}, ("stage of 0, 1, 2 or 3", "4")),
        ({"bf16": True}, "", {}, ("bf16", "a block")),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "", {}, ("scheduler.type", "without a type")),
    ],
)
def test_conflicts_name_both_places_and_both_values(
    data: dict[str, Any], explicit: str, changed: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = rejected(data, explicit, **changed)
    assert all(word in message for word in words), message
    assert "ds.json" in message


def test_equal_values_in_job_and_json_do_not_conflict() -> None:
    data = {
        "train_batch_size": 32,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "scheduler": copy.deepcopy(SCHEDULER),
    }
    explicit = ("train.train_batch_size", "train.gradient_clipping", "schedule.peak_lr", "train.max_steps")
    config, _ = composed(data, *explicit)
    assert {key: config[key] for key in ("train_batch_size", "gradient_clipping", "scheduler")} == {
        "train_batch_size": 32,
        "gradient_clipping": 1,
        "scheduler": SCHEDULER,
    }


def test_the_json_wins_over_values_that_the_job_does_not_set() -> None:
    config, changes = composed({"gradient_clipping": 0.3, "optimizer": {"type": "Adam", "params": {"lr": 2e-6}}})
    assert config["gradient_clipping"] == 0.3
    assert config["optimizer"]["type"] == "Adam"
    assert config["optimizer"]["params"]["lr"] == 2e-6
    assert "optimizer.params.lr" not in changes


def test_all_problems_are_listed_at_once() -> None:
    message = rejected(
        {"gradient_clipping": 2.0, "train_batch_size": 8}, "train.gradient_clipping", "train.train_batch_size"
    )
    assert "train.gradient_clipping" in message
    assert "train.train_batch_size" in message


plain = st.dictionaries(
    st.sampled_from(["wandb", "flops_profiler", "aio", "custom", "zero_optimization"]),
    st.fixed_dictionaries(
        {},
        optional={"stage": st.integers(0, 2), "enabled": st.booleans(), "note": st.sampled_from(["", "a"])},
    ),
)


def _leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@given(plain)
def test_every_difference_is_recorded_as_a_change(data: dict[str, Any]) -> None:
    config, changes = composed(copy.deepcopy(data))
    before, after = _leaves(data), _leaves(config)
    differing = {path for path in before | after if before.get(path) != after.get(path)}
    assert all(any(path == changed or path.startswith(f"{changed}.") for changed in changes) for path in differing)
    assert compose(from_mapping(config, "ds.json"), DECISIONS).changes == ()


def test_the_planner_reads_what_the_json_sets() -> None:
    config = from_mapping(
        {
            "train_batch_size": "16",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bfloat16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": "2e-5", "eps": "auto"}},
            "scheduler": {"type": "WarmupLR"},
            "zero_optimization": {
                "stage": "3",
                "cpu_offload_param": True,
                "offload_optimizer": {"device": "nvme"},
            },
        },
        "ds.json",
    )
    assert batch_keys(config) == {"train_batch_size": 16}
    assert optimizer_of(config) == {"type": "AdamW", "params": {"lr": 2e-5}}
    assert scheduler_of(config) == {"type": "WarmupLR", "params": {}}
    assert zero_stage(config) == 3
    assert offload(config) == Offload("nvme", "cpu")
    assert precision_of(config) == "bf16"
    assert clipping_of(config) is None


@pytest.mark.parametrize(("value", "size"), [(0, "0"), (2.5, "2.5"), ("many", "many"), (True, "True")])
def test_an_invalid_batch_size_is_rejected(value: Any, size: str) -> None:
    with pytest.raises(RequestError, match=f"train_batch_size.*{size}"):
        batch_keys(from_mapping({"train_batch_size": value}, "ds.json"))


@pytest.mark.parametrize(
    ("data", "precision"),
    [
        ({}, None),
        ({"fp16": {"enabled": False}}, None),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"torch_autocast": {"enabled": True}}, "fp32"),
        ({"fp16": {"enabled": "true"}}, "fp16"),
        ({"fp16": {"enabled": 1}, "bf16": {"enabled": 0}}, "fp16"),
        ({"bf16": {"enabled": "Yes"}}, "bf16"),
        ({"bf16": {"enabled": "false"}, "fp16": {"enabled": "off"}}, "fp32"),
        ({"bf16": "auto", "fp16": "auto"}, None),
    ],
)
def test_precision(data: dict[str, Any], precision: str | None) -> None:
    assert precision_of(from_mapping(data, "ds.json")) == precision
