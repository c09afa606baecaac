from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.schedule.advice import (
    FAMILIES,
    Situation,
    advise,
    advised_peak_lr,
    advised_schedule,
    parse_warmup,
)
from launcher.schedule.curve import lr_curve
from launcher.schedule.safety import check_safety

SEVEN = Situation(7_000_000_000, "full", 128 * 2048, 1000, 20_000)

situations = st.builds(
    Situation,
    parameters=st.integers(10**6, 10**12),
    method=st.sampled_from(list(FAMILIES)),
    tokens_per_update=st.one_of(st.none(), st.floats(1e2, 1e8)),
    total_updates=st.one_of(st.integers(1, 12), st.integers(1, 5000)),
    dataset_samples=st.one_of(st.none(), st.integers(1, 10**8)),
    beta2=st.sampled_from([0.95, 0.98, 0.99, 0.999]),
    task=st.sampled_from([None, "similar", "divergent"]),
)


@settings(max_examples=500, deadline=None)
@given(situation=situations)
def test_advice_gives_a_safe_schedule_with_reasons(situation: Situation) -> None:
    advice = advise(situation)
    schedule = advised_schedule(situation, advice)
    assert check_safety(schedule, method=situation.method, parameters=situation.parameters) == []
    assert min(lr_curve(schedule)) > 0
    assert schedule.floor_lr <= 0.11 * schedule.peak_lr
    assert advice.floor.value * schedule.peak_lr == pytest.approx(schedule.floor_lr, rel=1e-9)
    for choice in (advice.peak_lr, advice.warmup_updates, advice.shape, advice.floor):
        assert choice.reason.endswith(".")
    for choice in (advice.peak_lr, advice.warmup_updates):
        assert choice.low <= choice.value <= choice.high
    assert float(f"{advice.peak_lr.value:.1e}") == advice.peak_lr.value


@settings(max_examples=300, deadline=None)
@given(
    method=st.sampled_from(list(FAMILIES)),
    sizes=st.lists(st.floats(1e6, 1e12), min_size=2, max_size=6),
    tokens=st.one_of(st.none(), st.floats(1e2, 1e8)),
)
def test_the_peak_never_rises_with_size(method: str, sizes: list[float], tokens: float | None) -> None:
    peaks = [advised_peak_lr(method, size, tokens) for size in sorted(sizes)]
    assert peaks == sorted(peaks, reverse=True)


@settings(max_examples=300, deadline=None)
@given(situation=situations)
def test_the_warm_up_is_at_least_one_update_and_at_most_a_fifth_of_the_run(situation: Situation) -> None:
    warmup = advise(situation).warmup_updates.value
    total = situation.total_updates
    assert warmup <= max(0.2 * total, 1)
    assert warmup >= 1 or total == 1


def test_full_fine_tuning_of_7b_is_in_the_conservative_range() -> None:
    advice = advise(SEVEN)
    assert 1e-5 <= advice.peak_lr.value <= 5e-5
    assert not advice.peak_lr.heuristic
    assert "7B parameters" in advice.peak_lr.reason


def test_the_peaks_of_the_methods_are_in_the_expected_order() -> None:
    peaks = {method: advised_peak_lr(method, 7e9, 2.6e5) for method in FAMILIES}
    assert peaks["preference"] < peaks["preference-lora"] < peaks["full"] < peaks["lora"]
    assert 5 <= peaks["lora"] / peaks["full"] <= 20


def test_the_peak_scales_with_the_root_of_the_batch_within_bounds() -> None:
    at = {tokens: advised_peak_lr("full", 7e9, tokens) for tokens in (1.0, 2.6e5, 4 * 2.6e5, 1e9)}
    assert at[4 * 2.6e5] == pytest.approx(2 * at[2.6e5], rel=0.05)
    assert at[1.0] == pytest.approx(at[2.6e5] / 2, rel=0.05)
    assert at[1e9] == pytest.approx(min(4 * at[2.6e5], 5e-5), rel=0.05)


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({}, "linear"),
    ({"task": "similar", "dataset_samples": 10**7}, "linear"),
    ({"dataset_samples": 10**6}, "cosine"),
    ({"task": "divergent"}, "cosine"),
    ({"dataset_samples": None}, "linear"),
    ({"total_updates": 20}, "cosine"),
]


@pytest.mark.parametrize(("changes", "shape"), SHAPES)
def test_the_shape_depends_on_data_and_task(changes: dict[str, Any], shape: str) -> None:
    assert advise(replace(SEVEN, **changes)).shape.value == shape


def test_a_very_short_run_is_not_linear_and_gives_the_reason() -> None:
    shape = advise(replace(SEVEN, total_updates=20)).shape
    assert "1/5 of the peak" in shape.reason
    assert not shape.heuristic
    assert advise(SEVEN).shape.heuristic


def test_the_warm_up_follows_adam_a_fraction_or_the_cap() -> None:
    long_run = replace(SEVEN, parameters=10**9, total_updates=50_000)
    assert advise(long_run).warmup_updates.value == 2000
    assert "2/(1 - beta2)" in advise(long_run).warmup_updates.reason
    assert advise(replace(long_run, total_updates=100_000)).warmup_updates.value == 3000
    assert advise(replace(long_run, total_updates=1000)).warmup_updates.value == 200
    assert advise(replace(long_run, total_updates=1000, beta2=0.98)).warmup_updates.value == 100
    large = advise(replace(long_run, parameters=70 * 10**9)).warmup_updates
    assert large.value == 5000
    assert large.heuristic
    assert "caution" in large.reason


def test_advice_follows_a_given_shape_and_warm_up() -> None:
    advice = advise(SEVEN, shape="linear", warmup_updates=4)
    assert advice.floor.value == pytest.approx(1 / 5)
    assert advise(SEVEN, shape="wsd").floor.value == 0.0
    assert advise(SEVEN, shape="constant").floor.value == 1.0
    assert advise(SEVEN, shape="step").floor.value is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lroa"}, "did you mean lora"),
        ({"task": "hard"}, "similar or divergent"),
        ({"total_updates": 0}, "1 or more"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_an_invalid_situation_is_rejected(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        advise(replace(SEVEN, **changes))


@pytest.mark.parametrize(
    ("value", "updates"),
    [
        (100, 100),
        (0, 0),
        (1, 1),
        (100.0, 100),
        (0.03, 30),
        (0.07, 70),
        (0.0001, 1),
        ("5%", 50),
        ("0.5 %", 5),
        ("100", 100),
        ("0.03", 30),
        ("3e-2", 30),
        ("2M tokens", 20),
        ("500k tokens", 5),
        ("150000 tokens", 2),
        ("0.002B tokens", 20),
    ],
)
def test_a_warm_up_is_updates_a_fraction_or_tokens(value: Any, updates: int) -> None:
    assert parse_warmup(value, 1000, 1e5) == updates


@pytest.mark.parametrize(
    "value", [-1, -0.1, 1.0, 2.5, True, float("nan"), "many", "5 percent", "101%", "-3", "1.2.3 tokens", ""]
)
def test_an_invalid_warm_up_is_rejected(value: Any) -> None:
    with pytest.raises(RequestError, match="not a warm-up"):
        parse_warmup(value, 1000, 1e5)


def test_a_warm_up_in_tokens_needs_the_tokens_per_update() -> None:
    with pytest.raises(RequestError, match="unknown here"):
        parse_warmup("2M tokens", 1000, None)
