"""Early stopping on ranks: one decision for all, its event, losses that cannot be compared, and its state."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.plan.schema import Plan
from launcher.records import RankEvent
from launcher.worker.early_stopping import EarlyStopping
from launcher.worker.ranks import Ranks
from tests.unit.worker.fake_engine import fake_ranks, on_each_rank, small_plan

LOSSES = [3.0, 2.0, 2.5, 2.1, 2.2, 1.0]
"""Of the evaluations after 0, 10, 20, … updates: with a patience of 3, the run ends after 40 updates."""


def plan_with(stopping: dict[str, Any] | None) -> Plan:
    return small_plan(data={"eval": "eval.jsonl"}, train={"eval_every": 10, "early_stopping": stopping})


def ignored(_event: RankEvent) -> None:
    """An event that the test does not look at."""


def end_of(stopping: EarlyStopping, losses: list[float], first: int = 0) -> int | None:
    """The update at which a run with these evaluations ends; None if it does not."""
    for number, loss in enumerate(losses):
        update = 10 * (first + number)
        stopping.evaluated(update, loss)
        if update and stopping.decide(update):
            return update
    return None


def test_all_ranks_decide_by_the_loss_of_the_first_and_record_one_event() -> None:
    """Rank 1 sees another last bit: by its own losses it would never end."""
    events: list[RankEvent] = []

    def ended(ranks: Ranks) -> tuple[int | None, str | None, Any]:
        stopping = EarlyStopping(plan_with({"patience": 3}), ranks, events.append)
        losses = LOSSES if ranks.first else [loss - number for number, loss in enumerate(LOSSES)]
        return end_of(stopping, losses), stopping.stop_reason, stopping.state_dict()

    first, second = on_each_rank(2, ended)
    assert first == second
    assert first[0] == 40
    assert events == [
        {"event": "early_stop", "update": 40, "reason": first[1], "best_update": 10, "best_loss": 2.0},
    ]


@pytest.mark.parametrize("saved", [1, 2, 3, 4])
def test_a_resume_continues_to_count_from_the_checkpoint(saved: int) -> None:
    """The state goes through a checkpoint after `saved` evaluations; later ones were undone and do not count."""
    plan = plan_with({"patience": 3})
    before = EarlyStopping(plan, fake_ranks(), ignored)
    assert end_of(before, LOSSES[:saved]) is None
    state = json.loads(json.dumps(before.state_dict()))
    end_of(before, [9.0, 9.0], saved)
    after = EarlyStopping(plan, fake_ranks(), ignored)
    after.load_state_dict(state)
    assert end_of(after, LOSSES[saved:], saved) == 40


def test_a_resume_may_switch_early_stopping_on() -> None:
    before = EarlyStopping(plan_with(None), fake_ranks(), ignored)
    assert end_of(before, LOSSES) is None
    after = EarlyStopping(plan_with({"patience": 1}), fake_ranks(), ignored)
    after.load_state_dict(before.state_dict())
    assert end_of(after, [1.5], len(LOSSES)) == 60


def test_a_checkpoint_of_an_earlier_version_has_no_state() -> None:
    stopping = EarlyStopping(plan_with({"patience": 3}), fake_ranks(), ignored)
    stopping.load_state_dict(None)
    assert stopping.state_dict() is None
    assert end_of(stopping, LOSSES) == 40


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_the_run(loss: float) -> None:
    stopping = EarlyStopping(plan_with({}), fake_ranks(), ignored)
    with pytest.raises(RunFailed, match=f"the evaluation loss after update 10 is {loss}") as failed:
        end_of(stopping, [3.0, loss])
    assert failed.value.code is FailureCode.NAN_LOSS


def test_without_early_stopping_a_loss_that_is_not_finite_is_not_counted() -> None:
    stopping = EarlyStopping(plan_with(None), fake_ranks(), ignored)
    assert end_of(stopping, [3.0, math.nan]) is None
    assert stopping.state_dict() == {"loss": 3.0, "update": 0, "not_better": 0}
