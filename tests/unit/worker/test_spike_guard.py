"""What ranks do about a loss spike: each policy, at which update, with which learning rates and events."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.schema import Plan
from launcher.records import RankEvent
from launcher.run_dir import RunDir
from launcher.worker.lr_check import LRCheck, OutOfSyncError
from launcher.worker.ranks import Ranks
from launcher.worker.spike_guard import SpikeGuard
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts, plan_of
from tests.unit.worker.fake_engine import PEAK, START, TOTAL, FakeEngine, fake_ranks, small_plan

JUMP = 40
"""The first update whose loss is high. The third one in a row makes a spike."""


@dataclass
class Watched:
    """A rank that watches a series of losses, its events, and the learning rate of every update that it made."""

    folder: Path
    plan: Plan
    ranks: Ranks = field(default_factory=fake_ranks)
    skips: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.run = RunDir(self.folder)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.made: list[float] = []
        self.engine = FakeEngine(self.plan, skips=self.skips)
        self.lr_check = LRCheck(self.ranks, self.plan, [f"h{rank}" for rank in range(self.ranks.world_size)])
        self.guard = self.new_guard()

    def new_guard(self) -> SpikeGuard:
        return SpikeGuard(self.run, self.plan, self.ranks, self.engine, self.lr_check, self.record_event)

    def record_event(self, event: RankEvent) -> None:
        details = {key: value for key, value in event.items() if key != "event"}
        self.events.append((event["event"], details))

    def update(self, loss: float, grad_norm: float | None = 1.0) -> None:
        """One update as the training loop makes it."""
        update = self.engine.global_steps
        self.made.append(self.lr_check.check(self.engine, update))
        self.engine.update()
        self.guard.watch(update, loss, grad_norm, skipped=not self.engine.was_step_applied())

    def until(self, stop: int, loss: float) -> None:
        while self.engine.global_steps < stop:
            self.update(loss)

    def spike(self) -> None:
        """Forty updates at a loss of 2, and three at a loss of 9."""
        self.until(JUMP, 2.0)
        self.until(JUMP + 3, 9.0)

    @property
    def kinds(self) -> list[tuple[str, int]]:
        return [(kind, details["update"]) for kind, details in self.events]

    def details(self, kind: str) -> dict[str, Any]:
        (found,) = [details for each, details in self.events if each == kind]
        return found


def watched(folder: Path, on_spike: str, **schedule: Any) -> Watched:
    return Watched(folder, small_plan(schedule={"on_spike": on_spike, **schedule}))


OUTLIERS = [("outlier", JUMP), ("outlier", JUMP + 1), ("spike", JUMP + 2)]


def test_warn_reports_the_spike_and_changes_nothing(tmp_path: Path) -> None:
    rank = watched(tmp_path, "warn")
    rank.spike()
    assert rank.kinds == OUTLIERS
    assert rank.details("spike")["remedy"] == "warn"
    assert (rank.guard.stop_reason, rank.guard.stop_code) == (None, None)
    assert rank.guard.plan is rank.plan
    assert rank.engine.lrs == [PEAK, PEAK]
    assert rank.run.plan_revisions() == []


def test_stop_stops_after_the_third_high_loss_and_not_earlier(tmp_path: Path) -> None:
    rank = watched(tmp_path, "stop")
    rank.until(JUMP, 2.0)
    rank.until(JUMP + 2, 9.0)
    assert (rank.guard.stop_reason, rank.guard.stop_code) == (None, None)
    rank.update(9.0)
    assert rank.kinds == OUTLIERS
    assert rank.details("spike")["remedy"] == "stop"
    assert rank.guard.stop_code is FailureCode.LOSS_SPIKE
    assert rank.guard.stop_reason is not None and rank.details("spike")["reason"] in rank.guard.stop_reason
    assert rank.guard.plan is rank.plan
    assert rank.run.plan_revisions() == []


# At update 43 the warm-up becomes 2 · 43 = 86 updates: the learning rate is 43/86 of its way from START to PEAK.
HALF_WAY = START + (PEAK - START) * 0.5


@pytest.mark.parametrize(("on_spike", "share"), [("extend_warmup", 1.0), ("lower_peak", 0.5)])
def test_a_remedy_lowers_the_learning_rate_from_the_next_update_on(tmp_path: Path, on_spike: str, share: float) -> None:
    rank = watched(tmp_path, on_spike)
    rank.spike()
    assert rank.kinds == [*OUTLIERS, ("warmup_extended", 43)]
    assert rank.details("spike")["remedy"] == on_spike
    assert rank.guard.stop_reason is None
    (file,) = rank.run.plan_revisions()
    revision = Plan.from_json(file.read_text())
    assert file.name == "plan.revision-1.json"
    assert revision == rank.guard.plan
    assert rank.details("warmup_extended") == {
        "update": 43,
        "warmup_updates": 86,
        "peak_lr": PEAK * share,
        "lr": pytest.approx(HALF_WAY * share, rel=1e-12),
        "plan_sha256": revision.sha256,
    }
    assert revision.sha256 != rank.plan.sha256
    assert rank.engine.lrs == [rank.details("warmup_extended")["lr"]] * 2

    rank.until(100, 2.0)
    assert rank.made[20:43] == [PEAK] * 23
    assert rank.made[43] == rank.details("warmup_extended")["lr"]
    assert rank.made[44] == pytest.approx(share * (START + (PEAK - START) * 44 / 86), rel=1e-12)
    assert rank.made[86:100] == [PEAK * share] * 14
    # The revision describes the whole run: also the updates that were made before it.
    planned = planned_lrs(revision)
    assert rank.made == [planned(update) for update in range(100)]


def test_a_revised_plan_is_the_one_that_updates_are_checked_against(tmp_path: Path) -> None:
    rank = watched(tmp_path, "extend_warmup")
    rank.spike()
    for group in rank.engine.optimizer.param_groups:
        group["lr"] = PEAK
    with pytest.raises(OutOfSyncError):
        rank.lr_check.check(rank.engine, 43)


def test_after_a_remedy_nothing_is_judged_for_32_updates(tmp_path: Path) -> None:
    """The detector learns the level that the loss has under the new learning rate."""
    rank = watched(tmp_path, "extend_warmup")
    rank.spike()
    del rank.events[:]
    rank.until(73, 9.0)
    rank.until(77, 50.0)
    assert rank.kinds == [("outlier", 75), ("outlier", 76)]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_the_warm_up_is_extended_as_often_as_the_job_allows(tmp_path: Path, most: int) -> None:
    rank = watched(tmp_path, "extend_warmup", max_extensions=most)
    level = 2.0
    for spike in range(3):
        rank.until(43 + 60 * spike - 3, level)
        level *= 5
        rank.until(43 + 60 * spike, level)
    extended = [("warmup_extended", 43 + 60 * spike) for spike in range(most)]
    refused = [("not_extended", 42 + 60 * spike) for spike in range(most, 3)]
    assert [kind for kind in rank.kinds if kind[0].endswith("extended")] == extended + refused
    assert [str(most) in details["reason"] for kind, details in rank.events if kind == "not_extended"] == [True] * len(
        refused
    )
    # 2 · 43, then 2 · 103, which is more than half of the run.
    warmups = [details["warmup_updates"] for kind, details in rank.events if kind == "warmup_extended"]
    assert warmups == [86, TOTAL // 2][:most]
    assert len(rank.run.plan_revisions()) == most
    assert rank.guard.stop_reason is None


def test_extensions_before_a_resume_count(tmp_path: Path) -> None:
    first = watched(tmp_path, "lower_peak", max_extensions=1)
    first.spike()
    (file,) = first.run.plan_revisions()
    second = Watched(tmp_path, Plan.from_json(file.read_text()))
    second.spike()
    assert second.kinds == [*OUTLIERS, ("not_extended", 42)]
    assert second.guard.plan is second.plan
    assert second.run.plan_revisions() == [file]


def test_late_in_the_run_a_warm_up_is_not_extended_and_a_peak_is_still_halved(tmp_path: Path) -> None:
    for on_spike, lr in (("extend_warmup", PEAK), ("lower_peak", PEAK / 2)):
        folder = tmp_path / on_spike
        folder.mkdir()
        rank = watched(folder, on_spike)
        rank.until(300, 2.0)
        rank.until(303, 9.0)
        kind = "not_extended" if on_spike == "extend_warmup" else "warmup_extended"
        assert [each for each, _ in rank.events] == ["outlier", "outlier", "spike", kind]
        assert rank.engine.lrs == [lr, lr]
        assert len(rank.run.plan_revisions()) == (0 if on_spike == "extend_warmup" else 1)
        assert rank.guard.stop_reason is None


def test_a_scheduler_of_the_users_own_json_is_left_as_it_is(tmp_path: Path) -> None:
    params = {"warmup_num_steps": 4, "warmup_max_lr": PEAK, "warmup_type": "linear"}
    user = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": PEAK}},
        "scheduler": {"type": "WarmupLR", "params": params},
    }
    job = job_of(
        train={"max_steps": TOTAL},
        cluster={"gpus_per_node": 0},
        schedule={"on_spike": "lower_peak", "allow_unsafe": True},
    )
    plan = plan_of(job, user, model_facts(), data_facts(), machine_facts(0))
    assert plan.learning_rate.schedule is None
    rank = watched(tmp_path, "warn")
    guard = SpikeGuard(rank.run, plan, rank.ranks, rank.engine, rank.lr_check, rank.record_event)
    for update in range(43):
        guard.watch(update, 2.0 if update < JUMP else 9.0, 1.0, skipped=False)
    assert rank.kinds == [*OUTLIERS, ("not_extended", 42)]
    assert guard.plan is plan
    assert rank.run.plan_revisions() == []


@pytest.mark.parametrize("on_spike", ["warn", "stop", "extend_warmup", "lower_peak"])
def test_all_ranks_decide_the_same_and_the_first_one_writes(tmp_path: Path, on_spike: str) -> None:
    plan = small_plan(schedule={"on_spike": on_spike})
    first, *others = ranks = [Watched(tmp_path, plan, fake_ranks(rank, 3)) for rank in range(3)]
    for rank in ranks:
        rank.spike()
    assert [kind for kind, _ in first.events][:3] == ["outlier", "outlier", "spike"]
    assert len(others) == 2
    for other in others:
        assert other.events == []
        assert other.guard.plan == first.guard.plan
        assert other.engine.lrs == first.engine.lrs
        assert other.guard.stop_reason == first.guard.stop_reason
        assert other.guard.stop_code == first.guard.stop_code
    assert len(first.run.plan_revisions()) == (1 if on_spike in ("extend_warmup", "lower_peak") else 0)


NOT_FINITE = [
    (math.nan, 1.0, "nan"),
    (math.inf, None, "inf"),
    (2.0, math.nan, "nan"),
    (2.0, math.inf, "inf"),
    (math.nan, math.inf, "nan"),
]


@pytest.mark.parametrize("on_spike", ["stop", "extend_warmup", "lower_peak"])
@pytest.mark.parametrize(("loss", "grad_norm", "value"), NOT_FINITE)
def test_an_update_whose_loss_or_gradient_is_not_finite_is_refused(
    tmp_path: Path, loss: float, grad_norm: float | None, value: str, on_spike: str
) -> None:
    rank = watched(tmp_path, on_spike)
    assert rank.guard.rejects(7, loss, grad_norm) is True
    ((kind, event),) = rank.events
    assert (kind, event["update"], event["remedy"]) == ("spike", 7, "stop")
    what = "gradient norm" if math.isfinite(loss) else "loss"
    assert what in event["reason"] and value in event["reason"]
    assert rank.guard.stop_code is FailureCode.NAN_LOSS
    assert rank.guard.stop_reason is not None
    assert what in rank.guard.stop_reason and "7" in rank.guard.stop_reason and value in rank.guard.stop_reason
    assert rank.run.plan_revisions() == []


@pytest.mark.parametrize("grad_norm", [None, 0.0, 1e30])
def test_finite_numbers_are_not_refused(tmp_path: Path, grad_norm: float | None) -> None:
    rank = watched(tmp_path, "stop")
    assert rank.guard.rejects(7, 1e30, grad_norm) is False
    assert rank.events == []
    assert (rank.guard.stop_reason, rank.guard.stop_code) == (None, None)


@pytest.mark.parametrize(("loss", "grad_norm", "_value"), NOT_FINITE)
def test_with_warn_the_update_is_made_and_reported(
    tmp_path: Path, loss: float, grad_norm: float | None, _value: str
) -> None:
    rank = watched(tmp_path, "warn")
    assert rank.guard.rejects(0, loss, grad_norm) is False
    assert rank.events == []
    rank.update(loss, grad_norm)
    assert rank.kinds == [("spike", 0)]
    assert rank.details("spike")["remedy"] == "warn"
    assert rank.guard.stop_reason is None


def test_fp16_leaves_skipped_updates_to_its_loss_scale(tmp_path: Path) -> None:
    plan = small_plan(schedule={"on_spike": "stop"}).model_copy(update={"precision": "fp16"})
    rank = Watched(tmp_path, plan, skips=(0, 1))
    assert rank.guard.rejects(0, math.nan, None) is False
    for _ in range(2):
        rank.update(2.0, math.inf)
    assert rank.engine.skipped_steps == 2
    assert rank.events == []
    assert rank.guard.stop_reason is None
    # Two skipped updates took no learning rate of the plan.
    rank.update(2.0)
    assert rank.made == [START, START, START]


@pytest.mark.parametrize(
    ("on_spike", "code"),
    [("warn", None), *((remedy, FailureCode.NAN_LOSS) for remedy in ("stop", "extend_warmup", "lower_peak"))],
)
def test_an_update_that_deepspeed_skips_stops_the_run_except_with_warn(
    tmp_path: Path, on_spike: str, code: FailureCode | None
) -> None:
    plan = small_plan(schedule={"on_spike": on_spike})
    rank = Watched(tmp_path, plan, skips=(1,))
    rank.update(2.0)
    assert rank.events == []
    rank.update(2.0, math.nan)
    assert rank.kinds == [("spike", 1)]
    assert rank.details("spike")["remedy"] == "stop"
    assert rank.guard.stop_code is code
    assert (rank.guard.stop_reason is None) == (code is None)
    assert rank.guard.plan is plan


def test_a_guard_resumes_between_two_outliers_from_its_state(tmp_path: Path) -> None:
    rank = watched(tmp_path, "stop")
    rank.until(JUMP, 2.0)
    rank.until(JUMP + 2, 9.0)
    state = json.loads(json.dumps(rank.guard.state_dict()))
    fresh = rank.new_guard()
    fresh.watch(JUMP + 2, 9.0, 1.0, skipped=False)
    assert fresh.stop_code is None
    resumed = rank.new_guard()
    resumed.load_state_dict(state)
    resumed.watch(JUMP + 2, 9.0, 1.0, skipped=False)
    assert resumed.stop_code is FailureCode.LOSS_SPIKE
