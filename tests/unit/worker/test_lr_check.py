"""All ranks on one plan: its hash and DeepSpeed's version before training, update and learning rate during it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode
from launcher.plan.revision import with_longer_warmup
from launcher.plan.schema import Plan
from launcher.worker import lr_check, scheduler
from launcher.worker.lr_check import LRCheck, OutOfSyncError, check_same_plan
from launcher.worker.ranks import Ranks
from tests.unit.inputs import job_of, machine_facts, plan_of
from tests.unit.worker.fake_engine import PEAK, START, WARMUP, FakeEngine, fake_ranks, on_each_rank, small_plan

HOSTS = ["h0", "h1", "h2", "h3"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan made with DeepSpeed 0.19.8, which every rank has; nobody has named the plan's hash."""
    monkeypatch.delenv("LAUNCHER_PLAN_SHA256", raising=False)
    monkeypatch.setattr(lr_check, "version", {"deepspeed": "0.19.8"}.__getitem__)
    return small_plan(schedule={"check_every": 3})


def other_plan(plan: Plan) -> Plan:
    return plan.model_copy(update={"ds_config": {**plan.ds_config, "gradient_clipping": 2.0}})


def same_plans(*plans: Plan) -> list[Any]:
    """What each rank gets from the comparison of these plans: the hosts, or the error."""
    return on_each_rank(len(plans), lambda ranks: check_same_plan(ranks, plans[ranks.rank]))


def test_ranks_with_equal_plans_get_the_host_of_every_rank(plan: Plan) -> None:
    assert same_plans(plan, plan, plan) == [["h0", "h1", "h2"]] * 3
    assert same_plans(plan) == [["h0"]]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_every_rank_names_the_one_with_another_plan(plan: Plan, odd: int) -> None:
    other = other_plan(plan)
    errors = same_plans(*(other if rank == odd else plan for rank in range(3)))
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert type(error) is OutOfSyncError
        assert error.code is FailureCode.PLAN_DIFFERS
        assert f"rank {odd} on h{odd} has {other.sha256[:12]}…" in str(error)
        assert plan.sha256[:12] in str(error)
        assert not any(f"rank {rank} on" in str(error) for rank in range(3) if rank != odd)


def test_the_supervisors_hash_counts_not_that_of_the_most_ranks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    other = other_plan(plan)
    monkeypatch.setenv("LAUNCHER_PLAN_SHA256", plan.sha256)
    for error in same_plans(other, plan, other):
        assert error.code is FailureCode.PLAN_DIFFERS
        assert "rank 0 on h0" in str(error) and "rank 2 on h2" in str(error) and "rank 1 on" not in str(error)
    # A plan that all ranks share may still be another one than the supervisor's.
    (error,) = same_plans(other)
    assert error.code is FailureCode.PLAN_DIFFERS


def test_every_rank_names_the_one_with_another_deepspeed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    this_rank = threading.local()

    def version(package: str) -> str:
        assert package == "deepspeed"
        return "0.19.9" if getattr(this_rank, "odd", False) else "0.19.8"

    def compare(ranks: Ranks) -> list[str]:
        this_rank.odd = ranks.rank == 1
        return check_same_plan(ranks, plan)

    monkeypatch.setattr(lr_check, "version", version)
    errors = on_each_rank(3, compare)
    for error in errors:
        assert type(error) is OutOfSyncError
        assert error.code is FailureCode.VERSIONS_DIFFER
        assert "rank 1 on h1 has 0.19.9" in str(error) and "0.19.8" in str(error)
        assert "rank 0 on" not in str(error) and "rank 2 on" not in str(error)


def test_ranks_that_agree_on_another_deepspeed_than_the_plans_are_refused(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_check, "version", lambda _: "0.19.9")
    for error in same_plans(plan, plan):
        assert error.code is FailureCode.VERSIONS_DIFFER
        assert "rank 0 on h0" in str(error) and "rank 1 on h1" in str(error)


def new_check(plan: Plan, rank: int = 0, world_size: int = 4) -> LRCheck:
    return LRCheck(fake_ranks(rank, world_size), plan, HOSTS)


def test_the_learning_rate_of_each_update_is_the_plans(plan: Plan) -> None:
    engine, checked = FakeEngine(plan), new_check(plan)
    found = []
    for update in range(WARMUP + 5):
        found.append(checked.check(engine, update))
        engine.update()
    assert found[0] == START
    assert found[1] == pytest.approx(2 * START, rel=1e-12)
    assert found[WARMUP:] == [PEAK] * 5


def set_lrs(engine: FakeEngine, lrs: Sequence[float]) -> None:
    for group, lr in zip(engine.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


@pytest.mark.parametrize("group", [0, 1, 2])
def test_another_learning_rate_in_one_parameter_group_is_named(plan: Plan, group: int) -> None:
    """Also where it differs in its last bit."""
    engine = FakeEngine(plan, groups=3)
    wrong = math.nextafter(START, 1.0)
    set_lrs(engine, [wrong if index == group else START for index in range(3)])
    with pytest.raises(OutOfSyncError) as raised:
        new_check(plan, rank=2).check(engine, 0)
    message = str(raised.value)
    assert raised.value.code is FailureCode.OUT_OF_STEP
    assert "rank 2 on h2" in message
    assert f"{wrong!r} in parameter group {group} of 3" in message
    assert f"{START!r}" in message
    assert message.count("parameter group") == 1


def test_all_groups_with_another_learning_rate_are_named(plan: Plan) -> None:
    engine = FakeEngine(plan, groups=3)
    set_lrs(engine, [1e-3, START, 2e-3])
    with pytest.raises(OutOfSyncError, match=r"0\.001 in parameter group 0 and 0\.002 in parameter group 2 of 3"):
        new_check(plan).check(engine, 0)
    alone = FakeEngine(plan, groups=1)
    set_lrs(alone, [1e-3])
    with pytest.raises(OutOfSyncError, match=r"0\.001") as raised:
        new_check(plan).check(alone, 0)
    assert "parameter group" not in str(raised.value)


def test_an_engine_at_another_update_is_refused_though_its_learning_rate_is_right(plan: Plan) -> None:
    engine = FakeEngine(plan)
    for _ in range(WARMUP + 5):
        engine.update()
    assert new_check(plan).check(engine, WARMUP + 5) == PEAK
    for update in (WARMUP + 4, WARMUP + 6):
        with pytest.raises(OutOfSyncError) as raised:
            new_check(plan).check(engine, update)
        assert f"{update}" in str(raised.value) and f"{WARMUP + 5}" in str(raised.value)


def test_an_update_after_a_skipped_one_is_made_at_the_learning_rate_of_the_skipped_one(plan: Plan) -> None:
    engine, checked = FakeEngine(plan, skips=(1,)), new_check(plan)
    found = []
    for update in range(4):
        found.append(checked.check(engine, update))
        engine.update()
    assert found == [START, *(pytest.approx(number * START, rel=1e-12) for number in (2, 2, 3))]


def test_a_scheduler_that_runs_ahead_is_noticed_at_the_next_update(plan: Plan) -> None:
    engine, checked = FakeEngine(plan), new_check(plan)
    checked.check(engine, 0)
    engine.update()
    engine.lr_scheduler.step()
    with pytest.raises(OutOfSyncError):
        checked.check(engine, 1)


def test_after_a_revision_the_revised_plan_counts(plan: Plan) -> None:
    engine, checked = FakeEngine(plan), new_check(plan)
    for _ in range(43):
        engine.update()
    revised = with_longer_warmup(plan, 43)
    assert checked.check(engine, 43) == PEAK
    checked.follow(revised)
    with pytest.raises(OutOfSyncError):
        checked.check(engine, 43)
    scheduler.follow(engine, revised, 43)
    assert checked.check(engine, 43) == pytest.approx(START + (PEAK - START) * 43 / 86, rel=1e-12)


def test_the_users_own_scheduler_is_checked_as_deepspeed_drives_it() -> None:
    """Two updates at its first learning rate, 0, then a quarter of the way up per update."""
    peak = 2.0**-17
    params = {"warmup_num_steps": 4, "warmup_min_lr": 0.0, "warmup_max_lr": peak, "warmup_type": "linear"}
    user = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": peak}},
        "scheduler": {"type": "WarmupLR", "params": params},
    }
    job = job_of(train={"max_steps": 10}, cluster={"gpus_per_node": 0}, schedule={"allow_unsafe": True})
    own = plan_of(job, user, machine=machine_facts(0))
    assert own.learning_rate.schedule is None
    engine, checked = FakeEngine(small_plan()), new_check(own)
    for update, share in enumerate([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]):
        set_lrs(engine, [share * peak, share * peak])
        engine.global_steps = update
        assert checked.check(engine, update) == share * peak


def test_ranks_are_compared_every_few_updates(plan: Plan) -> None:
    engine = FakeEngine(plan)
    sizes = []
    for update in range(7):
        sizes.append(len(new_check(plan).table_row(engine, update)))
        engine.update()
    # check_every is 3; each of four ranks adds three numbers.
    assert sizes == [12, 0, 0, 12, 0, 0, 12]


def test_a_rank_adds_its_own_three_numbers_to_the_table(plan: Plan) -> None:
    engine = FakeEngine(plan, skips=(0,))
    for _ in range(3):
        engine.update()
    row = [3.0, engine.lrs[0], 1.0]
    assert row[1] == pytest.approx(3 * START, rel=1e-12)
    assert new_check(plan, rank=0).table_row(engine, 3) == [*row, *[0.0] * 9]
    assert new_check(plan, rank=2).table_row(engine, 3) == [*[0.0] * 6, *row, *[0.0] * 3]


def compared(plan: Plan, change: Any, odd: int, world_size: int = 4) -> list[Any]:
    """What each rank gets from a comparison at update 3, where `change` was done to the engine of rank `odd`."""

    def compare(ranks: Ranks) -> None:
        engine = FakeEngine(plan)
        for _ in range(3):
            engine.update()
        if ranks.rank == odd:
            change(engine)
        checked = LRCheck(ranks, plan, HOSTS)
        checked.compare(ranks.sum(checked.table_row(engine, 3)), 3)

    return on_each_rank(world_size, compare)


CHANGES = {
    "learning rate": (lambda engine: set_lrs(engine, [0.125, 0.125]), "0.125"),
    "update": (lambda engine: setattr(engine, "global_steps", 17), "17"),
    "skipped updates": (lambda engine: setattr(engine, "skipped_steps", 23), "23"),
}


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_every_rank_names_the_one_that_differs(plan: Plan, name: str, odd: int) -> None:
    change, value = CHANGES[name]
    errors = compared(plan, change, odd)
    assert len(errors) == 4
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert type(error) is OutOfSyncError
        assert error.code is FailureCode.OUT_OF_STEP
        assert f"rank {odd} on h{odd}" in str(error) and value in str(error)
        assert not any(f"rank {rank} on" in str(error) for rank in range(4) if rank != odd)


def test_ranks_that_agree_pass_and_an_update_without_a_comparison_too(plan: Plan) -> None:
    assert compared(plan, lambda _: None, 0) == [None] * 4
    new_check(plan).compare([], 4)


def test_a_plan_from_its_file_is_the_same_plan(plan: Plan, tmp_path: Path) -> None:
    """Each rank reads plan.json itself."""
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert same_plans(plan, Plan.from_json(file.read_text())) == [["h0", "h1"]] * 2
