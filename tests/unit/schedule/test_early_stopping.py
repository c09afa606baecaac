"""The rule of `train.early_stopping`: after which evaluation a run ends, and with which reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.schedule.early_stopping import BestLoss, early_stop_reason, with_evaluation

losses = st.floats(0.0, 10.0, allow_nan=False)


def after(evaluations: list[float], min_delta: float = 0.0) -> BestLoss:
    """The best loss after these evaluations, one every 10 updates from update 0 on."""
    best = None
    for number, loss in enumerate(evaluations):
        best = with_evaluation(best, 10 * number, loss, min_delta)
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("evaluations", "min_delta", "expected"),
    [
        ([3.0], 0.0, BestLoss(3.0, 0, 0)),
        ([3.0, 2.0, 1.0], 0.0, BestLoss(1.0, 20, 0)),
        ([3.0, 2.0, 2.5, 2.4], 0.0, BestLoss(2.0, 10, 2)),
        ([3.0, 2.0, 2.0], 0.0, BestLoss(2.0, 10, 1)),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 0.0, BestLoss(1.9, 30, 1)),
        ([3.0, 2.5, 2.3, 2.1], 0.5, BestLoss(2.1, 30, 3)),
        ([3.0, 2.4, 2.3, 1.7], 0.5, BestLoss(1.7, 30, 0)),
    ],
)
def test_the_best_loss_and_the_evaluations_since(
    evaluations: list[float], min_delta: float, expected: BestLoss
) -> None:
    assert after(evaluations, min_delta) == expected


@given(st.lists(losses, min_size=1, max_size=20), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_count_equals_that_of_the_whole_list(evaluations: list[float], min_delta: float) -> None:
    """Counted again from the definition: each loss is compared with the lowest one before it."""
    better = [
        number for number in range(1, len(evaluations)) if evaluations[number] < min(evaluations[:number]) - min_delta
    ]
    found = after(evaluations, min_delta)
    assert found.not_better == len(evaluations) - 1 - (better[-1] if better else 0)
    assert found.loss == min(evaluations)
    assert found.update == 10 * evaluations.index(min(evaluations))


def test_the_reason_names_the_count_the_least_change_and_the_lowest_loss() -> None:
    assert early_stop_reason(BestLoss(2.0, 10, 2), patience=3, min_delta=0.0) is None
    assert early_stop_reason(BestLoss(2.0, 10, 3), patience=3, min_delta=0.0) == (
        "early stopping: the evaluation loss did not improve in 3 evaluations in a row; the lowest is 2.0000, after "
        "update 10"
    )
    assert early_stop_reason(BestLoss(2.0, 10, 1), patience=1, min_delta=0.01) == (
        "early stopping: the evaluation loss did not improve by more than 0.01 in 1 evaluation; the lowest is 2.0000, "
        "after update 10"
    )
