"""Keys that need evaluations: early stopping, and the export of the best checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import RequestError
from tests.unit.inputs import job_of, plan_of

EVALUATED: dict[str, Any] = {"data": {"eval": "eval.jsonl"}, "train": {"eval_every": 10, "max_steps": 100}}
BEST: dict[str, Any] = {**EVALUATED, "export": "best", "checkpoint": {"every": 10, "keep_best": 1}}


def refusal(**sections: Any) -> tuple[str, str | None, str | None]:
    """(what is wrong, key, hint) of the only problem of a job."""
    with pytest.raises(RequestError) as error:
        plan_of(job_of(**sections))
    (problem,) = error.value.problems
    return problem.message, problem.key, problem.hint


def warnings(**sections: Any) -> str:
    return "\n".join(plan_of(job_of(**sections)).warnings)


def test_early_stopping_needs_evaluations() -> None:
    train = {"max_steps": 100, "early_stopping": {}}
    message, key, hint = refusal(train=train)
    assert (message, key) == ("the job has no evaluation data", "train.early_stopping")
    assert hint == "set data.eval, or remove it"
    message, key, hint = refusal(data={"eval": "eval.jsonl"}, train=train)
    assert message == "the run evaluates only before the first and after the last update"
    assert (key, hint) == ("train.early_stopping", "set train.eval_every, or remove it")


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"patience": -1}, {"min_delta": -0.1}, {"min_delta": float("nan")}, {"after": 3}]
)
def test_values_of_early_stopping_that_make_no_sense(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    _, found, _ = refusal(**{**EVALUATED, "train": {**EVALUATED["train"], "early_stopping": wrong}})
    assert found == f"train.early_stopping.{key}"


def test_a_warning_if_the_patience_is_longer_than_the_run() -> None:
    def warned(patience: int) -> bool:
        train = {**EVALUATED["train"], "early_stopping": {"patience": patience}}
        return "the run cannot end early" in warnings(**{**EVALUATED, "train": train})

    assert not warned(9) and warned(10)


def test_the_plan_recommends_the_best_export_with_early_stopping() -> None:
    train = {**EVALUATED["train"], "early_stopping": {}}
    recommended = "export: best exports the checkpoint with the lowest evaluation loss"
    assert recommended in warnings(**{**EVALUATED, "train": train})
    assert recommended not in warnings(**{**BEST, "train": train})
    assert recommended not in warnings(**EVALUATED)


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"data": {}, "checkpoint": {"every": 10}}, "no evaluation data", "data.eval"),
        ({"train": {"max_steps": 100}}, "evaluates only before the first and after the last", "train.eval_every"),
        ({"checkpoint": {"every": 10}}, "the best checkpoint is not kept", "checkpoint.keep_best=1"),
        ({"checkpoint": {"keep_best": 1}}, "saves no checkpoints at evaluations", "checkpoint.every"),
        ({"checkpoint": {"every": 77, "keep_best": 1}}, "no checkpoint before the last of 100", "checkpoint.every"),
    ],
)
def test_the_best_export_needs_checkpoints_at_evaluations(changed: dict[str, Any], message: str, hint: str) -> None:
    train = {"max_steps": 100} if "data" in changed else BEST["train"]
    found, key, hinted = refusal(**{**BEST, "train": train, **changed})
    assert message in found and key == "export"
    assert hinted is not None and hint in hinted and hinted.endswith("or export: last")


@pytest.mark.parametrize(
    ("checkpoint", "warned"),
    [
        ({"every": 10}, False),
        ({"every": 5}, False),
        ({"every": 50, "keep_every": 10}, False),
        ({"every": 20}, True),
        ({"every": 10, "save_final": False}, True),
    ],
)
def test_a_warning_if_evaluations_have_no_checkpoint(checkpoint: dict[str, Any], warned: bool) -> None:
    found = warnings(**{**BEST, "checkpoint": {"keep_best": 1, **checkpoint}})
    assert ("not every evaluation has one" in found) == warned


@pytest.mark.parametrize(("value", "kept"), [(True, True), (False, False), ("last", "last"), ("best", "best")])
def test_what_export_may_be(value: bool | str, kept: bool | str) -> None:
    assert job_of(**{**BEST, "export": value}).export == kept


def test_another_value_of_export_is_refused() -> None:
    message, key, _ = refusal(**{**BEST, "export": "bset"})
    assert key is not None and key.startswith("export")
    assert "best" in message
