from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.schedule.advice import (
    Situation,
    adjusted_beta2,
    advise,
    advised_schedule,
)
from launcher.schedule.curve import lr_curve
from launcher.schedule.peak import BASES, advised_peak_lr, later_family
from launcher.schedule.safety import check_safety, peak_limit
from launcher.schedule.warmup import parse_warmup

SEVEN = Situation(7_000_000_000, "full", 128 * 2048, 1000, 20_000)

situations = st.builds(
    Situation,
    parameters=st.integers(10**6, 10**12),
    method=st.sampled_from(list(BASES)),
    tokens_per_update=st.one_of(st.none(), st.floats(1e2, 1e8)),
    total_updates=st.one_of(st.integers(1, 12), st.integers(1, 5000)),
    dataset_samples=st.one_of(st.none(), st.integers(1, 10**8)),
    beta2=st.sampled_from([0.95, 0.98, 0.99, 0.999]),
    task=st.sampled_from([None, "similar", "divergent"]),
    model_type=st.sampled_from([None, "llama", "qwen3", "gpt2"]),
    vocab_size=st.sampled_from([None, 32_000, 128_256]),
    lora_alpha=st.one_of(st.none(), st.floats(1.0, 1e4)),
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
    for choice in (advice.peak_lr, advice.warmup_updates, advice.shape, advice.floor, advice.sweep, advice.beta2):
        assert choice.reason.endswith(".")
    for choice in (advice.peak_lr, advice.warmup_updates):
        assert choice.low <= choice.value <= choice.high
    assert float(f"{advice.peak_lr.value:.1e}") == advice.peak_lr.value


@settings(max_examples=300, deadline=None)
@given(
    method=st.sampled_from(list(BASES)),
    sizes=st.lists(st.floats(1e6, 1e12), min_size=2, max_size=6),
    later=st.booleans(),
    alpha=st.one_of(st.none(), st.floats(1.0, 1e4)),
)
def test_the_peak_never_rises_with_size(method: str, sizes: list[float], later: bool, alpha: float | None) -> None:
    peaks = [advised_peak_lr(method, size, later=later, lora_alpha=alpha) for size in sorted(sizes)]
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
    assert "40% quantile" in advice.peak_lr.reason
    assert "the batch does not change it" in advice.peak_lr.reason


def test_the_peaks_of_the_methods_are_in_the_expected_order() -> None:
    peaks = {method: advised_peak_lr(method, 7e9) for method in BASES}
    assert peaks["preference"] < peaks["preference-lora"] < peaks["full"] < peaks["lora"]
    assert 5 <= peaks["lora"] / peaks["full"] <= 20


def test_the_batch_does_not_change_the_peak() -> None:
    small, large, unknown = (
        advise(replace(SEVEN, tokens_per_update=tokens)).peak_lr.value for tokens in (1e3, 1e8, None)
    )
    assert small == large == unknown


def test_size_lowers_the_peak_of_full_fine_tuning_only_for_very_large_models() -> None:
    at = {billions: advised_peak_lr("full", billions * 1e9) for billions in (1, 3, 7, 30, 70, 405)}
    assert at[3] == at[7] == at[30]
    assert at[30] > at[70] > at[405]
    assert at[1] >= at[3]
    assert advised_peak_lr("lora", 1e9) == advised_peak_lr("lora", 1e12)


def test_later_families_get_about_half_the_peak_of_full_fine_tuning() -> None:
    peaks = {kind: advise(replace(SEVEN, model_type=kind)).peak_lr for kind in ("llama", "qwen3", "mistral", "gpt2")}
    assert peaks["qwen3"].value == peaks["mistral"].value == peaks["llama"].value / 2
    assert peaks["llama"].value == peaks["gpt2"].value
    assert "Qwen 2, as other later families, gets 0.6 of that" in peaks["qwen3"].reason
    assert "2503.19206" in " ".join(peaks["qwen3"].sources)
    lora = [advise(replace(SEVEN, method="lora", model_type=kind)).peak_lr.value for kind in ("llama", "qwen3")]
    assert lora[0] == lora[1]


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "family"),
    [
        ("llama", 32_000, None),
        ("llama", 102_400, None),
        ("llama", 128_256, "Llama 3"),
        ("llama4", 202_048, "Llama 3"),
        ("qwen", 151_936, None),
        ("qwen2", 152_064, "Qwen 2"),
        ("qwen3_moe", None, "Qwen 2"),
        ("mixtral", 32_000, "Mistral"),
        ("gemma3_text", 262_144, "Gemma"),
        ("olmo2", 100_352, None),
        (None, None, None),
    ],
)
def test_the_family_follows_from_the_models_config(
    model_type: str | None, vocab_size: int | None, family: str | None
) -> None:
    assert later_family(model_type, vocab_size) == family


def test_the_lora_peak_is_scaled_by_alpha_but_not_by_rank() -> None:
    at = {alpha: advised_peak_lr("lora", 7e9, lora_alpha=alpha) for alpha in (8.0, 16.0, 32.0, 64.0, 256.0)}
    assert at[8.0] == at[16.0] == at[32.0] == advised_peak_lr("lora", 7e9)
    assert at[64.0] == at[32.0] / 2
    assert at[256.0] == 3e-5
    reason = advise(replace(SEVEN, method="lora", lora_alpha=64.0)).peak_lr.reason
    assert "alpha 64 scales it by 0.5" in reason
    assert advised_peak_lr("full", 7e9, lora_alpha=64.0) == advised_peak_lr("full", 7e9)


def test_the_peak_is_rounded_down_to_usual_digits() -> None:
    for exponent in (8.0, 8.7, 9.3, 10.1, 10.9, 11.4, 12.0):
        for method in BASES:
            peak = advised_peak_lr(method, 10**exponent)
            assert f"{peak:.1e}"[:3] in ("1.0", "1.5", "2.0", "3.0", "5.0", "7.0")


@settings(max_examples=200, deadline=None)
@given(situation=situations)
def test_a_sweep_tries_the_peak_and_values_on_both_sides_that_are_safe(situation: Situation) -> None:
    advice = advise(situation)
    tried = [float(value) for value in advice.sweep.value.split(",")]
    limit = peak_limit(situation.method, situation.parameters)
    assert limit is not None
    assert any(value == pytest.approx(advice.peak_lr.value, rel=1e-5) for value in tried)
    assert tried[0] == pytest.approx(advice.peak_lr.value / 2, rel=1e-5)
    assert max(tried) <= limit.peak_lr * (1 + 1e-5)
    assert f"schedule.peak_lr={advice.sweep.value}" in advice.sweep.reason


def test_a_sweep_of_a_long_run_has_trials_of_a_quarter_of_it() -> None:
    long, short = advise(SEVEN).sweep, advise(replace(SEVEN, total_updates=300)).sweep
    assert "train.max_steps=250" in long.reason
    assert "3 runs that take 0.75 times" in long.reason
    assert "max_steps" not in short.reason
    assert "3 runs that take 3 times" in short.reason


def test_beta2_for_another_batch_keeps_the_half_life_in_tokens() -> None:
    assert adjusted_beta2(0.999, 64, 64) == 0.999
    assert adjusted_beta2(0.999, 64, 128) == pytest.approx(0.999**2)
    assert adjusted_beta2(0.999, 512, 1) == pytest.approx(0.999998, rel=1e-6)
    beta2 = advise(replace(SEVEN, beta2=0.95)).beta2
    assert beta2.value == 0.95
    assert "0.9025 at twice" in beta2.reason


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
    assert "no published recipe does that" in large.reason
    assert "2406.09405" in " ".join(large.sources)
    capped = advise(replace(long_run, total_updates=1000)).warmup_updates
    assert "2/(1 - beta2) at beta2 0.999 would be 2000" in capped.reason


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
