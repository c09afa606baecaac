"""Curves: statistics, key updates, plot, summary lines, and a run's curves from its directory."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.lr_report.curves import (
    BARS,
    Curve,
    curve_stats,
    key_updates,
    lr_lines,
    plan_curve,
    schedule_curve,
    schedule_marks,
    sparkline,
    with_shapes,
)
from launcher.lr_report.files import csv_text
from launcher.lr_report.run_curves import applied_curve, run_curves
from launcher.lr_report.terminal_plot import downsample, plot_text, round_ticks
from launcher.plan.revision import schedule_of, with_longer_warmup
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, append_line, write_atomic
from launcher.schedule.curve import SHAPES, Schedule, lr_at, lr_curve, make_schedule
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from tests.unit.inputs import job_of, plan_of

PEAK = 2e-5


def thousand(shape: str = "linear") -> Schedule:
    """1,000 updates, with 100 of warm-up, and a peak of 2e-5."""
    return make_schedule(shape, peak_lr=PEAK, warmup_updates=100, total_updates=1000)


def test_the_statistics_of_a_thousand_updates() -> None:
    found = curve_stats(schedule_curve(thousand()))
    assert (found.highest_lr, found.highest_update, found.half_update) == (2e-5, 100, 50)
    assert (found.floor_lr, found.at_floor) == (PEAK / 101, 1)
    # The mean of the ramp is half the peak; over 900 updates the decay falls linearly from the peak towards peak/101.
    area = 50 + (900 + 100 * 450.5) / 101
    assert found.area_updates == pytest.approx(area, rel=1e-12)
    assert found.area == pytest.approx(area * PEAK, rel=1e-12)


def test_the_key_updates_of_a_thousand() -> None:
    curve = schedule_curve(thousand())
    assert key_updates(curve) == {
        0: "first update",
        50: "half of the peak",
        100: "peak",
        500: "middle of the run",
        555: "half-way down",
        999: "last update",
    }
    assert curve.lrs[554] > PEAK / 2 >= curve.lrs[555]
    assert curve.lrs[49] < PEAK / 2 <= curve.lrs[50]


def test_starts_of_segments_are_key_updates() -> None:
    schedule = thousand("wsd")
    found = key_updates(schedule_curve(schedule), schedule_marks(schedule))
    assert found[100] == "peak, constant to 1 of the peak"
    assert found[800] == "last at the peak, linear to 0 of the peak"
    step = schedule_marks(thousand("step"))
    assert (step[500], step[750]) == ("constant to 0.1 of the peak", "constant to 0.01 of the peak")


def test_the_floor_is_the_end_of_the_decay() -> None:
    found = curve_stats(schedule_curve(thousand("cosine")))
    assert found.floor_lr == PEAK * 0.1
    # Nine updates of the ramp are below a tenth of the peak, and the last update reaches it.
    assert found.at_floor == 11
    assert sum(lr < PEAK * 0.1 for lr in lr_curve(thousand("cosine"))) == 10
    assert curve_stats(Curve.of("flat", [1e-5] * 4)).at_floor == 4
    written = Curve.of("json", simulate_deepspeed("WarmupDecayLR", {"total_num_steps": 50}, 1e-5, 50))
    assert (curve_stats(written).floor_lr, curve_stats(written).at_floor) == (0.0, 2)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_shortest_runs_have_statistics_and_a_plot(updates: int) -> None:
    curve = Curve.of("tiny", [1e-5] * updates)
    assert curve_stats(curve).area_updates == pytest.approx(updates)
    assert set(key_updates(curve)) <= set(range(updates))
    assert "1.00e-05" in plot_text([curve]).plain
    assert curve_stats(Curve.of("nothing", [0.0] * updates)).area_updates == 0
    assert plot_text([Curve.of("nothing", [0.0] * updates)]).plain


def test_compared_shapes_have_the_same_peak_warmup_and_length() -> None:
    own = schedule_curve(thousand())
    curves = with_shapes(own, [shape for shape in SHAPES if shape != "compound"], PEAK, 100, 1000)
    assert curves[0] is own
    assert [curve.name for curve in curves] == [shape for shape in SHAPES if shape != "compound"]
    for curve in curves[1:]:
        assert list(curve.lrs) == lr_curve(thousand(curve.name))
        assert curve.lrs[0] == pytest.approx(own.lrs[0], rel=1e-12)
        assert max(curve.lrs) == pytest.approx(PEAK, rel=1e-5)


def test_csv_has_all_digits_and_empty_cells_for_missing_updates() -> None:
    whole, part = schedule_curve(thousand()), Curve("applied", (1 / 3e5, math.pi * 1e-6), (3, 5))
    rows = list(csv.DictReader(io.StringIO(csv_text([whole, part]))))
    assert [int(row["update"]) for row in rows] == list(range(1000))
    assert [float(row["linear"]) for row in rows] == lr_curve(thousand())
    assert {int(row["update"]): float(row["applied"]) for row in rows if row["applied"]} == {
        3: 1 / 3e5,
        5: math.pi * 1e-6,
    }


@given(st.lists(st.floats(0, 1), min_size=1, max_size=400), st.integers(2, 60))
def test_downsampling_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    updates, kept = downsample(Curve.of("any", values), most)
    assert len(kept) <= most + 2
    assert (updates[0], updates[-1]) == (0, len(values) - 1)
    assert updates == sorted(set(updates))
    assert (max(kept), min(kept)) == (max(values), min(values))
    assert kept == [values[update] for update in updates]


@given(st.integers(1, 10_000_000))
def test_ticks_are_few_round_and_within_the_range(last: int) -> None:
    ticks = round_ticks(last)
    assert ticks[0] == 0 and ticks[-1] <= last
    assert 2 <= len(ticks) <= 9
    step = ticks[1]
    assert str(step).rstrip("0") in {"1", "2", "5"}
    assert ticks == list(range(0, last + 1, step))


@pytest.mark.parametrize("width", [80, 120])
def test_a_plot_fits_its_width_and_works_without_colour(width: int) -> None:
    curves = [schedule_curve(thousand()), schedule_curve(thousand("wsd"))]
    plain = plot_text(curves, width).plain
    assert max(len(line) for line in plain.splitlines()) <= width
    assert "\x1b" not in plain
    assert "linear" in plain and "wsd" in plain
    drawn = plain.splitlines()[2]
    # The first row has the peak of one curve and the plateau of the other, with different characters.
    assert drawn.count("o") > 0.5 * width * 0.7
    assert any(0x2800 < ord(character) < 0x2900 for character in drawn)
    coloured = plot_text(curves, width, colour=True)
    assert len({span.style for span in coloured.spans}) >= 2


def test_the_plot_rises_and_falls_with_the_curve() -> None:
    rows = [line[9:-1] for line in plot_text([schedule_curve(thousand())], 80).plain.splitlines()[1:-2]]
    top = [column for column, character in enumerate(rows[0]) if character.strip("⠀ ")]
    bottom = [column for column, character in enumerate(rows[-1]) if character.strip("⠀ ")]
    assert 5 <= min(top) <= 9 and max(top) < 16
    assert min(bottom) == 0 and max(bottom) == len(rows[0]) - 1


def test_a_sparkline_shows_the_curve_in_one_line() -> None:
    line = sparkline(lr_curve(thousand()), 50)
    assert len(line) == 50
    assert line[5] == BARS[-1] and line[-1] == BARS[0]
    assert line[:5] == "".join(sorted(line[:5]))
    assert line[6:] == "".join(sorted(line[6:], reverse=True))
    assert sparkline([0.0, 0.0]) == BARS[0] * 2


def test_the_summary_lines_have_values_and_reasons() -> None:
    plan = plan_of(job_of(train={"max_steps": 1000}, schedule={"shape": "linear", "peak_lr": 2e-5, "warmup": 100}))
    first, line, statistics_line, *reasons = lr_lines(plan)
    assert first == "linear: up to 2e-05 in 100 updates of warm-up, then to 2.2e-07 at the last of 1000"
    assert line == sparkline(lr_curve(thousand()))
    assert "half of the peak at update 50, the peak at 100; equivalent to 505 updates" in statistics_line
    assert reasons[0] == "peak lr 2e-05: schedule.peak_lr in the job is 2e-05."
    advised = lr_lines(plan_of())
    assert any(text.startswith("warmup") and text.endswith("(heuristic)") for text in advised)
    assert any(text.startswith("peak lr") and " to " in text.split(":")[0] for text in advised)


def a_run(folder: Path, total: int = 100) -> tuple[RunDir, Plan]:
    schedule = {"shape": "linear", "peak_lr": 2e-5, "warmup": 10}
    plan = plan_of(job_of(train={"max_steps": total}, schedule=schedule))
    run = RunDir.create(folder, "tiny")
    write_atomic(run.plan_file, plan.to_json())
    return run, plan


def apply(run: RunDir, curve: Curve, updates: range) -> None:
    for update in updates:
        append_line(run.metrics_file, {"update": update, "lr": curve.at(update)})


def test_a_run_without_updates(tmp_path: Path) -> None:
    run, plan = a_run(tmp_path)
    found = run_curves(run)
    assert [curve.name for curve in found.curves] == ["planned"]
    assert found.curves[0].lrs == plan_curve(plan).lrs
    assert found.notes == ("The run has not made an update yet.",)


def test_an_extension_is_shown_with_the_original(tmp_path: Path) -> None:
    run, plan = a_run(tmp_path)
    longer = with_longer_warmup(plan, 20)
    write_atomic(run.path / "plan.revision-1.json", longer.to_json())
    run.event({"event": "warmup_extended", "update": 20, "warmup_updates": 40, "peak_lr": 2e-5})
    apply(run, plan_curve(longer), range(60))
    found = run_curves(run)
    extended, planned, applied = found.curves
    assert [curve.name for curve in found.curves] == ["extended at 20", "planned", "applied"]
    assert planned.lrs == tuple(lr_curve(schedule_of(plan)))
    assert extended.lrs[:20] == planned.lrs[:20]
    assert extended.lrs[20] == pytest.approx(planned.lrs[20] * 0.58, rel=0.05)
    assert extended.lrs[40] == 2e-5
    assert applied.lrs == extended.lrs[:60]
    assert found.warnings == ()
    assert found.notes == (
        "At update 20 the warm-up was lengthened to 40 updates, to a peak of 2e-05.",
        "60 of 100 updates were made, all at exactly the planned learning rate.",
    )


def test_an_unplanned_learning_rate_is_reported(tmp_path: Path) -> None:
    run, plan = a_run(tmp_path)
    apply(run, plan_curve(plan), range(5))
    append_line(run.metrics_file, {"update": 5, "lr": 1e-3})
    assert "1 not at a planned learning rate: update 5 at 0.001" in run_curves(run).warnings[0]


def test_an_event_without_its_revision_is_reported(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path)
    run.event({"event": "warmup_extended", "update": 20, "warmup_updates": 40, "peak_lr": 2e-5})
    assert "more warm-up extensions" in run_curves(run).warnings[0]


def test_repeated_updates_count_with_their_last_value(tmp_path: Path) -> None:
    run, plan = a_run(tmp_path)
    apply(run, Curve.of("other", [9.0] * 100), range(8))
    apply(run, plan_curve(plan), range(6))
    assert applied_curve(run).lrs == plan_curve(plan).lrs[:6]
    assert applied_curve(run).updates == tuple(range(6))


def test_the_curve_of_a_plan_is_that_of_its_schedule() -> None:
    plan = plan_of(job_of(train={"max_steps": 50}, schedule={"shape": "cosine", "peak_lr": 2e-5, "warmup": 5}))
    schedule = schedule_of(plan)
    assert plan_curve(plan).lrs == tuple(lr_at(schedule, update) for update in range(50))


def test_damaged_lines_of_a_run_are_ignored_and_counted(tmp_path: Path) -> None:
    plan = plan_of()
    run = RunDir.create(tmp_path, "x")
    write_atomic(run.plan_file, plan.to_json())
    curve = plan_curve(plan)
    for update in range(3):
        append_line(run.metrics_file, {"update": update, "lr": curve.at(update)})
        with run.metrics_file.open("ab") as file:
            file.write(b'{"update": 7, "lr\xff')
    append_line(run.metrics_file, {"update": 3, "lr": curve.at(3)})
    curves = run_curves(run)
    assert curves.curves[-1].updates == (0, 1, 2, 3)
    assert "Damaged lines of metrics.jsonl, which are ignored: 3." in curves.warnings
