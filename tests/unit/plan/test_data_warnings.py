"""Few rows, and rows to evaluate on: what the plan says."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import RequestError
from launcher.plan.data_warnings import data_warnings
from tests.unit.inputs import data_facts, job_of, machine_facts, plan_of, split_facts

ONE_RANK: dict[str, Any] = {"gpus_per_node": 0, "processes_per_node": 1}


@pytest.mark.parametrize(("rows", "ranks", "batch"), [(1, 1, 1), (3, 1, 2), (5, 2, 4), (1, 2, 2), (1000, 1, 32)])
def test_an_open_batch_fits_the_data(rows: int, ranks: int, batch: int) -> None:
    job = job_of(cluster={**ONE_RANK, "processes_per_node": ranks})
    plan = plan_of(job, data=data_facts(rows), machine=machine_facts())
    assert plan.train_batch_size == batch
    assert plan.length.total_updates == -(-rows // batch)


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 3}, {"total_samples": 9}])
def test_an_open_batch_is_within_the_rows_whatever_the_length(length: dict[str, Any]) -> None:
    plan = plan_of(job_of(cluster=ONE_RANK, train=length), data=data_facts(3), machine=machine_facts())
    assert plan.train_batch_size == 2


@pytest.mark.parametrize(
    ("train", "user", "key", "hint"),
    [
        ({"train_batch_size": 8}, {}, "train.train_batch_size", "at most 3, or more epochs"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            "train.train_micro_batch_size_per_gpu",
            "at most 3, or more epochs",
        ),
        ({"gradient_accumulation_steps": 8}, {}, "train.gradient_accumulation_steps", "at most 3, or more epochs"),
        ({}, {"train_batch_size": 8}, "train_batch_size", "at most 3, or more epochs"),
        ({}, {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", "at most 3, or more epochs"),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            {},
            "train.train_micro_batch_size_per_gpu",
            "leave it out; or more epochs, or fewer ranks",
        ),
    ],
)
def test_too_large_a_batch_names_the_key_that_was_given(
    train: dict[str, int], user: dict[str, int], key: str, hint: str
) -> None:
    job = job_of(cluster=ONE_RANK, train=train)
    with pytest.raises(RequestError, match="3 sequences in all are less than one batch of 8") as caught:
        plan_of(job, user={"zero_optimization": {"stage": 2}, **user}, data=data_facts(3), machine=machine_facts())
    assert [(problem.key, problem.hint) for problem in caught.value.problems] == [(key, hint)]


def test_what_happens_to_evaluation_rows_is_reported() -> None:
    job = job_of(data={"eval": "org/set", "train": "org/set", "max_length": 77})
    held_out = split_facts(10, cut=3, dropped=2, partly_learned=1)
    data = data_facts(20).model_copy(update={"eval": held_out, "shared_rows": 4, "notes": ("a note of reading",)})
    assert data_warnings(job, data) == [
        "a note of reading",
        "4 of 10 evaluation rows are training rows too, so the evaluation loss says less about new text; "
        "data.eval names the same as data.train (of a hub data set, data.eval_split takes another split)",
        "3 of 10 evaluation rows are cut at 77 tokens",
        "2 of 10 evaluation rows have no target and are left out",
        "in 1 evaluation conversations some assistant turns are not counted: the chat template rewrites them once "
        "other turns follow",
    ]
    assert set(data_warnings(job, data)) <= set(plan_of(job, data=data).warnings)
    assert data_warnings(job, data_facts(20, evaluated=5)) == []
    assert "eval_split" not in data_warnings(job_of(data={"eval": 0.2}), data)[1]
