"""Plans with packed sequences: they count bins, derive a batch from tokens, and refuse what would train otherwise."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.errors import Problem, RequestError
from launcher.job import ScriptJob, validate_job
from launcher.plan.inputs import plan_inputs
from launcher.plan.packing import fullness
from launcher.plan.schema import Plan
from launcher.plan.script import check_script_inputs
from launcher.prepare.packing_probe import FLASH
from launcher.runs.print_plan import print_plan
from launcher.runs.rest import _job_with
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts, plan_of, preset

PLAIN = ("sdpa", *FLASH)
LENGTH = 1000
INSTALLED = {"flash-attn": "2.8", "triton": "3", "liger-kernel": "0.6"}


def packed(
    *, sequences: int = 9000, bins: int = 1000, user: dict | None = None, ranks: int = 8, facts: Any = None, **job: Any
) -> Plan:
    """A plan of sequences of 100 tokens in bins of 1000, on eight GPUs."""
    sections = {**job, "data": {"packing": True, "max_length": LENGTH, **job.get("data", {})}}
    model = model_facts(**{"packed_attention": PLAIN, **(facts or {})})
    data = data_facts(sequences, bins=bins)
    return plan_of(job_of(**sections), user, model, data, machine_facts(ranks, versions=INSTALLED, compiler="g++"))


def refused(**options: Any) -> Problem:
    with pytest.raises(RequestError) as caught:
        packed(**options)
    (problem,) = caught.value.problems
    assert problem.hint
    return problem


def test_epochs_updates_and_samples_count_bins() -> None:
    plan = packed(train={"num_train_epochs": 2, "train_batch_size": 16})
    assert (plan.length.total_updates, plan.length.samples, plan.length.updates_per_epoch) == (125, 2000, 62.5)
    assert plan.length.tokens_per_update == 16 * 900
    assert fullness(plan.training.job, plan.training.data) == pytest.approx(0.9)
    unpacked = packed(train={"num_train_epochs": 2, "train_batch_size": 16}, data={"packing": False})
    assert unpacked.length.total_updates == 1125


def test_a_batch_that_is_not_given_has_about_as_many_sequences_as_without_packing() -> None:
    assert packed(sequences=9000, bins=1000, ranks=1).train_batch_size == 4
    assert packed(sequences=1000, bins=900, ranks=1).train_batch_size == 29
    assert packed(sequences=90_000, bins=1000, ranks=1).train_batch_size == 1
    assert packed(sequences=9000, bins=1000, ranks=8).train_batch_size == 8


def test_memory_is_that_of_rows_of_max_length() -> None:
    train = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    row, padded = packed(train=train).training.memory, packed(train=train, data={"packing": False}).training.memory
    # The longest sequence has 100 tokens, which are padded to 104; a bin has 1000.
    assert row["activations"] == pytest.approx(padded["activations"] * 1000 / 104, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "train", "user", "expected"),
    [
        (64_000, {}, None, 64),
        (64_999, {}, None, 64),
        (70_000, {}, None, 64),
        (70_000, {"train_micro_batch_size_per_gpu": 3}, None, 48),
        (70_000, {"gradient_accumulation_steps": 4}, None, 64),
        (70_000, {}, {"train_micro_batch_size_per_gpu": 3}, 48),
        (8_000, {}, None, 8),
    ],
)
def test_the_batch_is_the_most_bins_that_fit_in_the_tokens_and_that_ranks_share_evenly(
    tokens: int, train: dict, user: dict | None, expected: int
) -> None:
    plan = packed(train={"tokens_per_batch": tokens, **train}, user=user)
    assert plan.train_batch_size == plan.ds_config["train_batch_size"] == expected


@pytest.mark.parametrize(
    ("options", "found", "hint"),
    [
        ({"tokens": 7_999}, "7999 tokens are fewer than 8 bins of 1000, the smallest batch", "use at least 8000"),
        ({"train_batch_size": 16}, "train_batch_size is 16: only one of the two can be set", "remove one"),
        ({"user": {"train_batch_size": 16}}, "train_batch_size is 16: only one of the two can be set", "remove one"),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            "with the number of ranks they already give the batch",
            "remove one of the three",
        ),
        ({"packing": False}, "a batch can only be given in tokens if sequences are packed", "data.packing: true"),
        ({"tokens": 10**7, "num_train_epochs": 1}, "the run has 1000 bins, fewer than one batch of 10000", "1000000"),
    ],
)
def test_an_unusable_number_of_tokens_is_refused(options: dict, found: str, hint: str) -> None:
    given = dict(options)
    tokens, user, packing = given.pop("tokens", 64_000), given.pop("user", None), given.pop("packing", True)
    problem = refused(train={"tokens_per_batch": tokens, **given}, user=user, data={"packing": packing})
    assert problem.key == "train.tokens_per_batch"
    assert found in problem.message and hint in problem.hint


@pytest.mark.parametrize(
    ("model", "facts", "found", "hint"),
    [
        ({"sequence_parallel_size": 2}, {}, "cannot be combined with model.sequence_parallel_size", "one of the two"),
        ({"torch_compile": True}, {}, "cannot be combined with model.torch_compile", "one of the two"),
        ({"liger": True}, {}, "cannot be combined with model.liger", "one of the two"),
        ({}, {"packed_attention": ()}, "computed something else than for each sequence alone", "then padded"),
        ({"attn_implementation": "eager"}, {}, "would attend to each other", "auto or sdpa or flash_attention_2"),
        (
            {"attn_implementation": "flash_attention_2"},
            {"packed_attention": ("sdpa",)},
            "with model.attn_implementation flash_attention_2 packed sequences would attend to each other",
            "auto or sdpa",
        ),
        ({}, {"router_loss_coefficient": 0.01}, "the balance loss of the experts' routers", "output_router_logits"),
    ],
)
def test_what_would_be_trained_otherwise_is_refused(model: dict, facts: dict, found: str, hint: str) -> None:
    shared = {"key_value_heads": 8, "whole_attention": True}
    problem = refused(model=model, facts={**shared, **facts}, train={"train_batch_size": 16})
    assert problem.key == "data.packing"
    assert found in problem.message and hint in problem.hint


@pytest.mark.parametrize("attention", ["auto", "sdpa", "flash_attention_2"])
def test_attention_that_keeps_the_sequences_apart_is_accepted(attention: str) -> None:
    plan = packed(model={"attn_implementation": attention}, train={"train_batch_size": 16})
    assert not any("bins" in warning for warning in plan.warnings)


def test_bins_that_stay_partly_empty_are_reported() -> None:
    (warning,) = (each for each in packed(bins=1500).warnings if "full" in each)
    assert "the bins are only 60% full" in warning and "data.max_length" in warning


def test_a_script_s_batch_cannot_be_given_in_tokens() -> None:
    train = {"tokens_per_batch": 4096, "train_micro_batch_size_per_gpu": 1, "max_steps": 10}
    job = validate_job({"name": "mine", "script": {}, "train": train, "schedule": {"peak_lr": 1e-4}})
    assert isinstance(job, ScriptJob)
    with pytest.raises(RequestError, match="a batch can only be given in tokens if sequences are packed"):
        check_script_inputs(plan_inputs(job, preset("zero2"), machine_facts(1)))


def test_a_resume_keeps_the_batch_that_the_tokens_gave_unless_other_tokens_are_given() -> None:
    plan = packed(train={"tokens_per_batch": 70_000})
    assert plan.train_batch_size == 64
    kept = _job_with(plan, ["cluster.nodes=2"])[0].job.train
    assert (kept.train_batch_size, kept.tokens_per_batch) == (64, None)
    changed = _job_with(plan, ["train.tokens_per_batch=32000"])[0].job.train
    assert (changed.train_batch_size, changed.tokens_per_batch) == ("auto", 32_000)
    with pytest.raises(RequestError, match="this cannot change when a run is resumed"):
        _job_with(plan, ["data.packing=false"])


def test_the_plan_prints_bins_and_how_full_they_are() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(packed(train={"tokens_per_batch": 70_000}), console)
    text = console.file.getvalue()
    assert "1,000 bins of 1,000 tokens, 90.0% full" in text
    assert "the most bins that fit in 70,000 tokens" in text
    assert "64 bins = micro-batch" in text


def test_grouping_by_length_is_refused_with_packing_and_reported_if_it_has_no_effect() -> None:
    problem = refused(data={"group_by_length": True}, train={"train_batch_size": 16})
    assert problem.key == "data.group_by_length" and "has no effect" in problem.message

    def warnings(micro_batch: int) -> list[str]:
        sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": micro_batch}
        plan = packed(data={"packing": False, "group_by_length": True}, train=sizes, ranks=1)
        return [warning for warning in plan.warnings if "group_by_length" in warning]

    assert "an update has a single micro-batch" in warnings(4)[0]
    assert warnings(2) == []
