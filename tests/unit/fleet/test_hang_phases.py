"""What a run does, when its phases and its updates arrive in another order than they happened, and before training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.fleet.hang_detector import LONG_SECONDS, HangDetector, Setting
from launcher.records import Phase

TOTAL = 12
EVERY = 4
"""The run evaluates and then saves after every EVERY updates."""
LIMIT = 5.0


def detector(setting: Setting = LIMIT, **options: object) -> HangDetector:
    """A detector of a run whose ranks have just been started."""
    found = HangDetector(setting, TOTAL, **options)  # type: ignore[arg-type]
    found.check(0.0)
    return found


def trained(updates: int, **options: object) -> HangDetector:
    found = detector(**options)
    found.enter("training", 0)
    for update in range(updates):
        found.update(update, 0.5)
    return found


@pytest.mark.parametrize("setting", ["auto", LIMIT])
def test_ranks_that_hang_while_loading_are_found_after_half_an_hour(setting: Setting) -> None:
    loading = detector(setting)
    hangs = [loading.check(float(second)) for second in range(0, int(LONG_SECONDS) + 20, 10)]
    assert [str(hang) for hang in hangs if hang] == ["no progress for 1810 s while loading, after 0 updates"]


def test_a_longer_limit_also_holds_while_loading() -> None:
    assert detector(7200.0).limit() == 7200.0


def test_loading_is_not_watched_if_the_check_is_off() -> None:
    assert detector(0).limit() is None


@pytest.mark.parametrize("phase", ["saving", "exporting"])
def test_an_update_that_is_seen_after_the_phase_that_follows_it_does_not_end_the_phase(phase: Phase) -> None:
    """metrics.jsonl may be on slow storage, the phases do not use it."""
    run = trained(3)
    run.enter(phase, 4)
    run.update(3, 0.5)
    assert run.limit() == LONG_SECONDS


def test_a_phase_that_is_seen_after_later_updates_does_not_hide_an_evaluation() -> None:
    run = trained(8, evaluates=True, eval_every=EVERY)
    assert run.limit() == LONG_SECONDS
    run.enter("saving", 4)
    run.enter("training", 4)
    assert run.limit() == LONG_SECONDS
    run.evaluated(4)
    assert run.limit() == LONG_SECONDS
    run.evaluated(8)
    assert run.limit() == LIMIT


def test_the_end_of_the_run_after_its_last_evaluation_has_half_an_hour() -> None:
    run = trained(TOTAL, evaluates=True)
    run.evaluated(TOTAL)
    assert run.limit() == LONG_SECONDS


@given(data=st.data())
def test_whatever_arrives_first_work_of_unknown_duration_has_half_an_hour(data: st.DataObject) -> None:
    """Phases, updates and evaluations each keep their own order; the newest of them all decides."""
    run = detector(evaluates=True, eval_every=EVERY)
    phases: list[tuple[Phase, int]] = [("training", 0)]
    for done in range(EVERY, TOTAL, EVERY):
        phases += [("saving", done), ("training", done)]
    phases.append(("saving", TOTAL))
    queues = {"phase": phases, "update": list(range(TOTAL)), "evaluation": list(range(0, TOTAL + 1, EVERY))}
    while any(queues.values()):
        kind = data.draw(st.sampled_from([name for name, queue in queues.items() if queue]))
        if kind == "phase":
            run.enter(*queues["phase"].pop(0))  # type: ignore[misc]
        elif kind == "update":
            run.update(queues["update"].pop(0), 0.5)  # type: ignore[arg-type]
        else:
            run.evaluated(queues["evaluation"].pop(0))  # type: ignore[arg-type]
        updates_seen = TOTAL - len(queues["update"])
        written = queues["evaluation"][0] - EVERY if queues["evaluation"] else TOTAL  # type: ignore[operator]
        newest_phase = phases_seen_last(len(phases))
        if updates_seen % EVERY == 0 and updates_seen > max(written, newest_phase):
            assert run.limit() == LONG_SECONDS, "it evaluates"
    assert run.limit() == LONG_SECONDS


def phases_seen_last(remaining: int) -> int:
    """The updates of the newest phase that was seen, of which `remaining` are still to come."""
    seen = 2 * (TOTAL // EVERY) - remaining
    return max(0, seen // 2 * EVERY) if seen else 0


@pytest.mark.parametrize("value", [None, "slow", float("nan"), float("inf"), [1]])
def test_seconds_of_an_update_that_are_not_a_finite_number_are_ignored(value: object) -> None:
    run = trained(3, setting="auto")
    limit = run.limit()
    run.update(3, value)
    assert run.limit() == limit


def test_a_script_may_count_its_updates_from_0_again() -> None:
    script = detector(script=True)
    for update in (5, 6, 0, 1):
        script.update(update, 0.5)
    found = [hang for second in range(20) if (hang := script.check(float(second)))]
    assert str(found[0]).endswith("while training, after 2 updates")


def test_a_detector_that_is_switched_off_finds_nothing() -> None:
    run = trained(3)
    assert run.limit() == LIMIT
    run.switch_off()
    assert all(run.check(10.0 * step) is None for step in range(1000))
