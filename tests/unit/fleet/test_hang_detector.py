"""When a run without progress counts as hung."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.fleet.hang_detector import FLOOR_SECONDS, LONG_SECONDS, Hang, HangDetector, Setting

TOTAL = 1000


def training(setting: Setting = "auto", **options: object) -> HangDetector:
    """A detector of a run that has just started to train."""
    detector = HangDetector(setting, TOTAL, **options)  # type: ignore[arg-type]
    detector.check(0.0)
    detector.enter("training", 0)
    return detector


def hang_after(detector: HangDetector, start: float, seconds: float) -> float | None:
    """After how many seconds without progress a hang is found, with a check every half second."""
    for step in range(int(2 * seconds)):
        if detector.check(start + step / 2) is not None:
            return step / 2
    return None


def steady(detector: HangDetector, interval: float, updates: int, start: float = 0.0) -> float:
    """Makes updates with this many seconds between; returns the time. None of the checks may find a hang."""
    now = start
    for update in range(updates):
        until = now + interval
        while now < until:
            now = min(until, now + 0.5)
            assert detector.check(now) is None
        detector.update(update, interval)
    return now


@pytest.mark.parametrize("interval", [0.1, 3.0, 90.0, 900.0])
def test_a_slow_but_steady_run_never_hangs_and_a_stop_is_found_at_the_limit(interval: float) -> None:
    detector = training()
    now = steady(detector, interval, 30)
    limit = max(FLOOR_SECONDS, 10 * interval)
    assert detector.limit() == pytest.approx(limit)
    found = hang_after(detector, now, limit + 20)
    assert found is not None and limit - 1 <= found <= limit + 2


@given(st.lists(st.floats(0.01, 50.0), min_size=2, max_size=60))
def test_no_interval_below_ten_times_the_longest_recent_one_is_a_hang(intervals: list[float]) -> None:
    detector = training()
    now = 0.0
    for update, interval in enumerate(intervals):
        recent = intervals[max(1, update - 20) : update]
        if update > 1 and interval > max(FLOOR_SECONDS, 10 * max(recent)):
            return
        until = now + interval
        while now < until:
            now = min(until, now + 5.0)
            assert detector.check(now) is None
        detector.update(update, interval)


def test_a_number_is_the_limit_between_updates() -> None:
    detector = training(5.0)
    now = steady(detector, 0.5, 5)
    found = hang_after(detector, now, 30)
    assert found is not None and 5 <= found <= 6
    assert str(detector.check(now + 100)).endswith("while training, after 5 updates")


def test_zero_switches_the_check_off() -> None:
    detector = training(0)
    assert hang_after(detector, steady(detector, 0.5, 5), 20_000) is None


@pytest.mark.parametrize("phase", ["saving", "exporting"])
@pytest.mark.parametrize("setting", ["auto", 5.0])
def test_saving_and_exporting_have_half_an_hour(phase: str, setting: Setting) -> None:
    detector = training(setting)
    now = steady(detector, 0.5, 5)
    detector.enter(phase, 5)  # type: ignore[arg-type]
    assert detector.limit() == LONG_SECONDS
    found = hang_after(detector, now, LONG_SECONDS + 100)
    assert found is not None and found >= LONG_SECONDS - 1


def test_the_first_update_has_half_an_hour() -> None:
    assert training(5.0).limit() == training().limit() == LONG_SECONDS


def test_an_evaluation_that_is_due_has_half_an_hour_until_it_is_written() -> None:
    detector = training(5.0, evaluates=True, eval_every=4)
    steady(detector, 0.5, 4)
    assert detector.limit() == LONG_SECONDS
    detector.evaluated(4)
    assert detector.limit() == 5.0


def test_the_end_of_the_run_has_half_an_hour() -> None:
    detector = HangDetector(5.0, 3)
    detector.check(0.0)
    detector.enter("training", 0)
    steady(detector, 0.5, 3)
    assert detector.limit() == LONG_SECONDS


def test_a_launcher_that_was_suspended_finds_no_hang() -> None:
    """It received nothing in that time, and the ranks may have made progress."""
    detector = training(30.0)
    now = steady(detector, 0.5, 5)
    assert detector.check(now + 3600) is None


def test_a_short_limit_does_not_hold_while_loading() -> None:
    detector = HangDetector(1.0, TOTAL)
    assert all(detector.check(float(second)) is None for second in range(100))


def test_a_script_has_half_an_hour_unless_the_job_sets_a_number() -> None:
    script = HangDetector("auto", TOTAL, script=True)
    script.check(0.0)
    now = steady(script, 0.5, 5)
    assert script.limit() == LONG_SECONDS
    strict = HangDetector(5.0, TOTAL, script=True)
    strict.check(0.0)
    now = steady(strict, 0.5, 5)
    found = hang_after(strict, now, 30)
    assert found is not None and found >= 5


def test_a_script_without_reports_never_hangs() -> None:
    script = HangDetector(5.0, TOTAL, script=True)
    assert all(script.check(float(second)) is None for second in range(0, 10_000, 5))


def test_the_text_of_a_hang() -> None:
    assert str(Hang(61.4, "training", 7)) == "no progress for 61 s while training, after 7 updates"
