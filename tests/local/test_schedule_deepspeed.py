"""The schedule's maths against DeepSpeed's classes, its engine, and transformers' schedules."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.schedule.curve import (
    DEEPSPEED_TYPES,
    Schedule,
    deepspeed_blocks,
    extend_warmup,
    live_attributes,
    lower_peak,
    make_schedule,
    rate_at,
    rates,
)
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed

pytestmark = pytest.mark.local

os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch = pytest.importorskip("torch")
lr_schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Any:
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def an_optimizer(group_rates: list[float]) -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in group_rates]
    return torch.optim.AdamW(groups, lr=group_rates[0])


def real_rates(
    kind: str, params: dict[str, Any], group_rates: list[float], updates: int, extra: int
) -> list[list[float]]:
    """What each group's rate is before each update, with the class stepped as the engine steps it."""
    optimizer = an_optimizer(group_rates)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    for _ in range(extra):
        scheduler.step()
    seen = []
    for _ in range(updates):
        seen.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    return seen


lr = st.floats(1e-9, 1e-1)
ratio = st.floats(0.0, 1.0)
steps = st.one_of(st.integers(1, 5), st.integers(1, 400))
ramps = {"warmup_num_steps": steps, "warmup_type": st.sampled_from(["log", "linear", "cubic"])}
start = {"last_batch_iteration": st.sampled_from([-1, -1, 0, 7])}
PARAMS: dict[str, Any] = {
    "WarmupLR": st.fixed_dictionaries({}, optional={"warmup_min_lr": lr, "warmup_max_lr": lr, **ramps, **start}),
    "WarmupDecayLR": st.fixed_dictionaries(
        {"total_num_steps": steps}, optional={"warmup_min_lr": lr, "warmup_max_lr": lr, **ramps, **start}
    ),
    "WarmupCosineLR": st.fixed_dictionaries(
        {"total_num_steps": steps},
        optional={"warmup_min_ratio": ratio, "cos_min_ratio": ratio, **ramps, **start},
    ),
    "OneCycle": st.fixed_dictionaries(
        {"cycle_min_lr": lr, "cycle_max_lr": lr, "cycle_first_step_size": steps},
        optional={
            "cycle_second_step_size": st.integers(0, 50),
            "cycle_first_stair_count": st.integers(0, 5),
            "cycle_second_stair_count": st.integers(0, 5),
            "decay_lr_rate": st.floats(0.0, 2.0),
            "decay_step_size": st.integers(0, 9),
        },
    ),
    "LRRangeTest": st.fixed_dictionaries(
        {},
        optional={
            "lr_range_test_min_lr": lr,
            "lr_range_test_step_size": steps,
            "lr_range_test_step_rate": ratio,
            "lr_range_test_staircase": st.booleans(),
        },
    ),
}


@pytest.mark.parametrize("kind", list(PARAMS))
@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_replica_equals_deepspeeds_class_to_the_last_bit(kind: str, data: Any) -> None:
    params = data.draw(PARAMS[kind])
    group_rates = data.draw(st.lists(lr, min_size=1, max_size=3))
    extra = data.draw(st.integers(0, 2))
    real = real_rates(kind, params, group_rates, 40, extra)
    for group, base in enumerate(group_rates):
        ours = simulate_deepspeed(kind, params, base, 40, extra_steps=extra, group=group)
        assert ours == [row[group] for row in real]


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.tuples(lr, lr), min_size=2, max_size=3), total=steps, warmup=steps, data=st.data())
def test_lists_hold_a_rate_for_each_group(values: Any, total: int, warmup: int, data: Any) -> None:
    lows, highs = [list(column) for column in zip(*values, strict=True)]
    params = {
        "total_num_steps": total,
        "warmup_num_steps": warmup,
        "warmup_min_lr": lows,
        "warmup_max_lr": highs,
        "warmup_type": data.draw(st.sampled_from(["log", "linear"])),
    }
    real = real_rates("WarmupDecayLR", params, highs, 30, 1)
    for group in range(len(values)):
        ours = simulate_deepspeed("WarmupDecayLR", params, highs[group], 30, extra_steps=1, group=group)
        assert ours == [row[group] for row in real]


@st.composite
def schedules(draw: Any) -> Schedule:
    shape = draw(st.sampled_from(list(DEEPSPEED_TYPES)))
    total = draw(st.one_of(st.integers(1, 5), st.integers(1, 300)))
    least = 1 if shape == "linear" and total > 1 else 0
    warmup = draw(
        st.one_of(
            st.integers(least, max(least, 2)),
            st.integers(least, max(least, total)),
            st.just(max(least, total)),
        )
    )
    floors = {
        # Among the subnormal numbers a floor has too few digits to come back from its share of the peak.
        "cosine": st.one_of(st.none(), st.just(0.0), st.floats(1e-200, 1.0)),
        "linear": st.one_of(st.none(), st.floats(1 / (warmup + 1), 1)),
    }
    return make_schedule(
        shape,
        peak_lr=draw(lr),
        warmup_updates=warmup,
        total_updates=total,
        floor=draw(floors.get(shape, st.none())),
        warmup_type=draw(st.sampled_from(["linear", "linear", "log"])),
    )


@settings(max_examples=3000, deadline=None)
@given(schedule=schedules(), others=st.lists(lr, max_size=2))
def test_a_schedule_equals_the_class_built_from_its_own_json(schedule: Schedule, others: list[float]) -> None:
    blocks = deepspeed_blocks(schedule)
    group_rates = [blocks["optimizer"]["params"]["lr"], *others]
    kind, params = blocks["scheduler"]["type"], blocks["scheduler"]["params"]
    real = real_rates(kind, params, group_rates, schedule.total_updates, extra=1)
    assert rates(schedule) == [row[0] for row in real]
    for group, base in enumerate(others, start=1):
        ours = [rate_at(schedule, update, base) for update in range(schedule.total_updates)]
        assert ours == [row[group] for row in real]


@settings(max_examples=1000, deadline=None)
@given(schedule=schedules(), data=st.data())
def test_an_extended_warm_up_equals_the_live_class_changed_on_the_way(schedule: Schedule, data: Any) -> None:
    first = data.draw(st.integers(0, schedule.total_updates - 1))
    try:
        longer = extend_warmup(schedule, first)
    except RequestError:
        return
    block = deepspeed_blocks(schedule)["scheduler"]
    optimizer = an_optimizer([schedule.peak_lr])
    scheduler = getattr(lr_schedules, block["type"])(optimizer, **block["params"])
    seen = []
    for update in range(schedule.total_updates):
        scheduler.step()
        if update == first:
            for name, value in live_attributes(longer, update).items():
                setattr(scheduler, name, value)
            scheduler.step(update)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == rates(longer)
    later = deepspeed_blocks(longer, update=first)["scheduler"]
    resumed = simulate_deepspeed(
        later["type"], later["params"], schedule.peak_lr, schedule.total_updates, extra_steps=1
    )
    assert resumed[first:] == seen[first:]


@settings(max_examples=1000, deadline=None)
@given(schedule=schedules(), groups=st.integers(1, 3), data=st.data())
def test_lowered_peaks_equal_the_live_class_changed_on_the_way(schedule: Schedule, groups: int, data: Any) -> None:
    last = schedule.total_updates - 1
    changes = sorted({data.draw(st.integers(0, last)), data.draw(st.integers(0, last))})
    block = deepspeed_blocks(schedule)["scheduler"]
    optimizer = an_optimizer([schedule.peak_lr] * groups)
    scheduler = getattr(lr_schedules, block["type"])(optimizer, **block["params"])
    lowered, seen = schedule, []
    for update in range(schedule.total_updates):
        scheduler.step()
        if update in changes:
            lowered = lower_peak(lowered, update)
            for name, value in live_attributes(lowered, update, groups).items():
                setattr(scheduler, name, value)
            scheduler.step(update)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [[rate] * groups for rate in rates(lowered)]
    later = deepspeed_blocks(lowered, update=changes[-1])
    lr = later["optimizer"]["params"]["lr"]
    kind, params = later["scheduler"]["type"], later["scheduler"]["params"]
    resumed = simulate_deepspeed(kind, params, lr, schedule.total_updates, extra_steps=1)
    assert resumed[changes[-1] :] == [row[0] for row in seen[changes[-1] :]]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 0}),
    ("WarmupLR", {"warmup_num_steps": -1}),
    ("WarmupLR", {"warmup_num_steps": 10.0}),
    ("WarmupLR", {"warmup_num_steps": "auto"}),
    ("WarmupLR", {"warmup_max_lr": "auto"}),
    ("WarmupLR", {"total_num_steps": 10}),
    ("WarmupDecayLR", {"warmup_num_steps": 10}),
    ("WarmupDecayLR", {"total_num_steps": "auto"}),
    ("WarmupDecayLR", {"total_num_steps": 10, "warmup_steps": 2}),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_max_lr": 1e-3}),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": "10"}),
    ("OneCycle", {"cycle_min_lr": 1e-4}),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 0}),
    ("LRRangeTest", {"lr_range_test_step_size": 0}),
]


@pytest.mark.parametrize(("kind", "params"), REFUSED)
def test_what_deepspeed_refuses_is_a_bad_request(kind: str, params: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        real_rates(kind, params, [1e-3], 1, 1)
    with pytest.raises(RequestError):
        simulate_deepspeed(kind, params, 1e-3, 1)


def an_engine(schedule: Schedule, accumulation: int, precision: dict[str, Any]) -> Any:
    deepspeed = pytest.importorskip("deepspeed")
    torch.manual_seed(0)
    blocks = deepspeed_blocks(schedule)
    blocks["optimizer"]["params"]["torch_adam"] = True
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 1},
        **blocks,
        **precision,
    }
    model = torch.nn.Linear(4, 1)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def micro_batch(engine: Any, scale: float) -> None:
    rows = torch.randn(2, 4, dtype=next(engine.module.parameters()).dtype) * scale
    engine.backward(engine(rows).float().pow(2).mean())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shape", list(DEEPSPEED_TYPES))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_real_engine_makes_every_update_with_the_planned_rate(shape: str, accumulation: int) -> None:
    schedule = make_schedule(shape, peak_lr=2e-3, warmup_updates=5, total_updates=20)
    engine = an_engine(schedule, accumulation, {})
    engine.lr_scheduler.step()
    seen = []
    for _ in range(20 * accumulation):
        micro_batch(engine, 1.0)
        if engine.is_gradient_accumulation_boundary():
            seen.append(engine.optimizer.param_groups[0]["lr"])
        engine.step()
    assert engine.global_steps == 20
    assert seen == rates(schedule)


@pytest.mark.usefixtures("one_process")
def test_a_skipped_update_spends_none_of_the_schedule() -> None:
    schedule = make_schedule("linear", peak_lr=2e-3, warmup_updates=4, total_updates=12)
    # Many CPUs have no fp16; bf16 with this check skips an update with gradients that are not finite too.
    engine = an_engine(schedule, 1, {"bf16": {"enabled": True, "check_grad_overflow": True}})
    engine.lr_scheduler.step()
    for turn in range(14):
        made = engine.global_steps - engine.skipped_steps
        if made == schedule.total_updates:
            break
        assert engine.optimizer.param_groups[0]["lr"] == rate_at(schedule, made)
        assert engine.lr_scheduler.last_batch_iteration == made
        micro_batch(engine, math.inf if turn in (2, 7) else 1.0)
        engine.step()
    assert engine.skipped_steps == 2
    assert engine.global_steps == 14


def peer_rates(name: str, peak: float, warmup: int, total: int) -> list[float]:
    transformers = pytest.importorskip("transformers")
    optimizer = an_optimizer([peak])
    scheduler = getattr(transformers, name)(optimizer, warmup, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_linear_differs_from_transformers_by_the_lift_of_the_ramp_alone() -> None:
    """Ours starts and ends at m = peak/(W+1) where theirs starts and ends at 0: ours = m + theirs·W/(W+1)."""
    ours = rates(make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000))
    theirs = peer_rates("get_linear_schedule_with_warmup", 2e-5, 100, 1000)
    assert theirs[0] == 0.0
    assert theirs[100] == ours[100] == 2e-5
    low = 2e-5 / 101
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(low + other * 100 / 101, rel=1e-12)
    assert max(m - o for m, o in zip(ours, theirs, strict=True)) == pytest.approx(low)


def test_without_the_lift_linear_is_transformers_linear_exactly() -> None:
    params = deepspeed_blocks(make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000))
    flat = {**params["scheduler"]["params"], "warmup_min_lr": 0.0}
    ours = simulate_deepspeed("WarmupDecayLR", flat, 2e-5, 1000, extra_steps=1)
    assert ours == peer_rates("get_linear_schedule_with_warmup", 2e-5, 100, 1000)


def test_cosine_differs_from_transformers_by_the_ramp_and_one_update_of_decay() -> None:
    """After the warm-up ours at update u is theirs at u+1: DeepSpeed is one update into the cosine at W."""
    ours = rates(make_schedule("cosine", peak_lr=2e-5, warmup_updates=100, total_updates=1000, floor=0.0))
    theirs = peer_rates("get_cosine_schedule_with_warmup", 2e-5, 100, 1000)
    for update in range(100):
        assert ours[update] == pytest.approx(2e-5 * (update + 1) / 101, rel=1e-12)
        assert theirs[update] == pytest.approx(2e-5 * update / 100, rel=1e-12)
    for update in range(100, 999):
        assert ours[update] == pytest.approx(theirs[update + 1], rel=1e-9, abs=1e-20)
    assert max(abs(m - o) for m, o in zip(ours[100:], theirs[100:], strict=True)) < 3.6e-8
    assert ours[999] == 0.0


def test_the_worked_example_has_these_values() -> None:
    """1,000 updates, 100 of warm-up, peak 2e-5."""
    linear = rates(make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000))
    assert linear[0] == 1.9801980198019803e-07
    assert linear[1] == 3.9603960396039606e-07
    assert linear[99] == 1.9801980198019803e-05
    assert linear[100] == 2e-5
    assert linear[550] == pytest.approx(2e-5 / 101 + (2e-5 - 2e-5 / 101) / 2, rel=1e-15)
    cosine = rates(make_schedule("cosine", peak_lr=2e-5, warmup_updates=100, total_updates=1000))
    assert cosine[100] == 1.9999945168920113e-05
    assert cosine[999] == pytest.approx(2e-6, rel=1e-15)
