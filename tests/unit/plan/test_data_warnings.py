"""Batches for few rows, and warnings about evaluation rows."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import RequestError
from launcher.plan.data_warnings import data_warnings
from tests.unit.inputs import data_facts, job_of, machine_facts, plan_of, split_facts

ONE_RANK: dict[str, Any] = {"gpus_per_node": 0, "processes_per_node": 1}


@pytest.mark.parametrize(("rows", "ranks", "batch"), [(1, 1, 1), (3, 1, 2), (5, 2, 4), (1, 2, 2), (1000, 1, 32)])
def test_the_default_batch_fits_the_data(rows: int, ranks: int, batch: int) -> None:
    job = job_of(cluster={**ONE_RANK, "processes_per_node": ranks})
    plan = plan_of(job, data=data_facts(rows), machine=machine_facts())
    assert plan.train_batch_size == batch
    assert plan.length.total_updates == -(-rows // batch)


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 3}, {"total_samples": 9}])
def test_the_default_batch_is_within_the_rows_for_any_length(length: dict[str, Any]) -> None:
    plan = plan_of(job_of(cluster=ONE_RANK, train=length), data=data_facts(3), machine=machine_facts())
    assert plan.train_batch_size == 2


@pytest.mark.parametrize(
    ("train", "user", "key", "hint"),
    [
        ({"train_batch_size": 8}, {}, "train.train_batch_size", "use at most 3, or more epochs"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            "train.train_micro_batch_size_per_gpu",
            "use at most 3, or more epochs",
        ),
        ({"gradient_accumulation_steps": 8}, {}, "train.gradient_accumulation_steps", "use at most 3, or more epochs"),
        ({}, {"train_batch_size": 8}, "train_batch_size", "use at most 3, or more epochs"),
        ({}, {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", "use at most 3, or more epochs"),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            {},
            "train.train_micro_batch_size_per_gpu",
            "remove it, or use more epochs or fewer ranks",
        ),
    ],
)
def test_the_error_for_a_too_large_batch_names_the_given_key(
    train: dict[str, int], user: dict[str, int], key: str, hint: str
) -> None:
    job = job_of(cluster=ONE_RANK, train=train)
    with pytest.raises(RequestError, match="the run has 3 sequences, fewer than one batch of 8") as caught:
        plan_of(job, user={"zero_optimization": {"stage": 2}, **user}, data=data_facts(3), machine=machine_facts())
    assert [(problem.key, problem.hint) for problem in caught.value.problems] == [(key, hint)]


def test_warnings_about_evaluation_rows() -> None:
    job = job_of(data={"eval": "org/set", "train": "org/set", "max_length": 77})
    held_out = split_facts(10, cut=3, dropped=2, partly_learned=1)
    data = data_facts(20).model_copy(update={"eval": held_out, "shared_rows": 4, "notes": ("a note of reading",)})
    assert data_warnings(job, data) == [
        "a note of reading",
        "4 of 10 evaluation rows are also training rows, so the evaluation loss says less about new text; "
        "data.eval is the same as data.train (for a hub data set, set data.eval_split)",
        "3 of 10 evaluation rows are cut at 77 tokens",
        "2 of 10 evaluation rows have no target tokens and are skipped",
        "in 1 evaluation conversations some assistant turns are not evaluated: the chat template changes them when "
        "other turns follow",
    ]
    assert set(data_warnings(job, data)) <= set(plan_of(job, data=data).warnings)
    assert data_warnings(job, data_facts(20, evaluated=5)) == []
    assert "eval_split" not in data_warnings(job_of(data={"eval": 0.2}), data)[1]
