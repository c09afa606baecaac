from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.schedule.curve import Schedule, extend_warmup, lower_peak, lr_at, make_schedule
from launcher.schedule.progress import convert_updates, rescale

batches = st.sampled_from([8, 12, 16, 24, 32, 48, 64, 96, 128, 256])


def test_updates_are_converted_by_samples_and_rounded() -> None:
    assert convert_updates(500, 64, 128) == 250
    assert convert_updates(500, 64, 16) == 2000
    assert convert_updates(3, 8, 16) == 2
    assert convert_updates(10, 8, 12) == 7
    with pytest.raises(RequestError):
        convert_updates(10, 0, 12)


@settings(max_examples=700, deadline=None)
@given(
    shape=st.sampled_from(["linear", "cosine", "constant", "wsd"]),
    old=batches,
    new=batches,
    total=st.integers(250, 6000),
    data=st.data(),
)
def test_the_learning_rate_continues_within_one_per_cent_of_the_peak(
    shape: str, old: int, new: int, total: int, data: Any
) -> None:
    warmup = data.draw(st.integers(1, total // 2))
    decay = total - max(warmup, round(0.8 * total)) if shape == "wsd" else total - warmup
    assume(min(warmup, decay) * min(1, old / new) >= 100)
    done = data.draw(st.integers(0, total - 1))
    schedule = make_schedule(shape, peak_lr=1e-4, warmup_updates=warmup, total_updates=total)
    resumed_schedule, resumed, text = rescale(
        schedule, done_updates=done, old_batch=old, new_batch=new, total_samples=total * old
    )
    jump = abs(lr_at(resumed_schedule, resumed) - lr_at(schedule, done))
    assert jump < 0.01 * 1e-4
    left = resumed_schedule.total_updates - resumed
    assert (left - 1) * new < (total - done) * old <= left * new
    assert lr_at(resumed_schedule, resumed_schedule.total_updates - 1) <= lr_at(schedule, total - 1) + 0.03 * 1e-4
    assert old == new or f" = {done * old} samples = " in text


@settings(max_examples=300, deadline=None)
@given(change=st.sampled_from([extend_warmup, lower_peak]), old=batches, new=batches, done=st.integers(200, 1900))
def test_a_changed_schedule_continues_as_changed(
    change: Callable[[Schedule, int], Schedule], old: int, new: int, done: int
) -> None:
    assume(400 * old / new >= 100)
    schedule = change(make_schedule("linear", peak_lr=1e-4, warmup_updates=100, total_updates=2000), 200)
    resumed_schedule, resumed, _ = rescale(
        schedule, done_updates=done, old_batch=old, new_batch=new, total_samples=2000 * old
    )
    assert abs(lr_at(resumed_schedule, resumed) - lr_at(schedule, done)) < 0.01 * 1e-4


def test_a_linear_schedule_to_zero_continues_to_zero_with_another_batch() -> None:
    schedule = make_schedule("linear", peak_lr=1e-4, warmup_updates=100, total_updates=1000, floor=0.0)
    halved, resumed, _ = rescale(schedule, done_updates=500, old_batch=64, new_batch=128, total_samples=64_000)
    assert (resumed, halved.total_updates) == (250, 500)
    assert lr_at(halved, 250) == pytest.approx(lr_at(schedule, 500), rel=0.01)
    assert lr_at(halved, 500) == 0.0 < lr_at(halved, 499)


def test_the_arithmetic_is_shown() -> None:
    schedule = make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000)
    rescaled, resumed, text = rescale(schedule, done_updates=500, old_batch=64, new_batch=128, total_samples=64_000)
    assert (resumed, rescaled.total_updates) == (250, 500)
    assert rescaled.warmup_updates == pytest.approx(50, abs=3)
    assert "500 updates × 64 = 32000 samples = 250 updates × 128" in text
    assert "Warm-up 100 × 64/128" in text


def test_the_same_batch_changes_nothing_and_a_finished_run_is_rejected() -> None:
    schedule = make_schedule("cosine", peak_lr=2e-5, warmup_updates=10, total_updates=100)
    same = rescale(schedule, done_updates=40, old_batch=8, new_batch=8, total_samples=800)
    assert same[:2] == (schedule, 40)
    with pytest.raises(RequestError, match="no samples are left"):
        rescale(schedule, done_updates=100, old_batch=8, new_batch=16, total_samples=800)


def test_step_positions_are_converted_by_samples() -> None:
    schedule = make_schedule("step", peak_lr=1.0, warmup_updates=100, total_updates=1000, decay_at=[500, 750])
    rescaled, _, _ = rescale(schedule, done_updates=200, old_batch=64, new_batch=32, total_samples=64_000)
    drops = [u for u in range(1, 2000) if lr_at(rescaled, u) < lr_at(rescaled, u - 1)]
    assert drops == pytest.approx([1000, 1500], abs=8)
