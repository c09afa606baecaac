from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import launcher.schedule
from launcher.errors import RequestError
from launcher.schedule.curve import (
    SHAPES,
    Schedule,
    deepspeed_blocks,
    deepspeed_class,
    extend_warmup,
    live_attributes,
    lower_peak,
    lr_at,
    lr_curve,
    make_schedule,
    warmup_at,
)

COMPOUND = {
    "segments": [
        {"kind": "constant", "until": 0.5},
        {"kind": "cosine", "until": 0.8, "to": 0.2},
        {"kind": "linear", "until": 1.0, "to": 0.05},
    ]
}


def a_schedule(shape: str, total: int = 1000, warmup: int = 100, **options: Any) -> Schedule:
    given_options = {**(COMPOUND if shape == "compound" else {}), **options}
    return make_schedule(shape, peak_lr=2e-5, warmup_updates=warmup, total_updates=total, **given_options)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ramp_starts_above_zero_and_reaches_the_peak_at_update_w(shape: str) -> None:
    schedule = a_schedule(shape)
    for update in range(100):
        assert lr_at(schedule, update) == pytest.approx(2e-5 * (update + 1) / 101, rel=1e-12)
    # WarmupCosineLR is one update into its decay by then.
    assert lr_at(schedule, 100) == pytest.approx(2e-5, rel=3e-6)
    assert max(lr_curve(schedule)) <= 2e-5
    assert min(lr_curve(schedule)) > 0


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "total"), [(1, 1), (1, 2), (1, 7), (2, 7), (7, 7), (9, 7), (100, 1000)])
def test_runs_of_any_length_have_the_requested_warm_up(shape: str, warmup: int, total: int) -> None:
    schedule = a_schedule(shape, total, warmup)
    curve = lr_curve(schedule)
    assert len(curve) == total
    for update in range(min(warmup, total)):
        assert curve[update] == pytest.approx(2e-5 * (update + 1) / (warmup + 1), rel=1e-12)
    if warmup < total - 1:
        assert curve[warmup] == pytest.approx(2e-5, rel=0.25 if shape == "cosine" else 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_survives_a_round_trip_through_json(shape: str) -> None:
    schedule = extend_warmup(a_schedule(shape), 120)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_unknown_and_missing_keys_are_rejected() -> None:
    plain = a_schedule("linear").to_dict()
    with pytest.raises(RequestError, match="peek"):
        Schedule.from_dict({**plain, "peek": 1})
    del plain["peak_lr"]
    with pytest.raises(RequestError, match="peak_lr"):
        Schedule.from_dict(plain)


def test_linear_ends_by_default_at_its_starting_value_with_deepspeeds_class() -> None:
    schedule = a_schedule("linear")
    assert schedule.floor_lr == schedule.start_lr == 2e-5 / 101
    assert a_schedule("linear", floor=0.1).start_lr == pytest.approx(2e-6)
    for same in (schedule, a_schedule("linear", floor=1 / 101), a_schedule("linear", floor=0.1)):
        assert deepspeed_class(same) == "WarmupDecayLR"
        assert same.segments == ()


def test_linear_with_a_lower_floor_decays_to_it_and_starts_above_zero() -> None:
    schedule = a_schedule("linear", floor=0.0)
    assert deepspeed_class(schedule) is None
    assert deepspeed_blocks(schedule)["scheduler"] is None
    curve = lr_curve(schedule)
    assert curve[:100] == pytest.approx([2e-5 * (update + 1) / 101 for update in range(100)])
    assert curve[100:] == pytest.approx([2e-5 * (1000 - update) / 900 for update in range(100, 1000)])
    assert min(curve) == curve[-1] > 0
    assert (lr_at(schedule, 1000), lr_at(schedule, 5000)) == (0.0, 0.0)
    assert (schedule.start_lr, schedule.floor_lr) == (2e-5 / 101, 0.0)
    low = a_schedule("linear", floor=0.005)
    assert low.floor_lr == pytest.approx(1e-7)
    assert low.start_lr == 2e-5 / 101


@given(
    floor=st.floats(0, 1),
    warmup=st.integers(0, 60),
    total=st.integers(1, 60),
    warmup_type=st.sampled_from(["linear", "log"]),
)
def test_every_linear_schedule_rises_to_the_peak_and_falls_towards_its_floor(
    floor: float, warmup: int, total: int, warmup_type: str
) -> None:
    if warmup == 0 and floor == 1.0 and total > 1:
        return
    schedule = a_schedule("linear", total=total, warmup=warmup, floor=floor, warmup_type=warmup_type)
    curve = lr_curve(schedule)
    top = curve.index(max(curve))
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert curve[top:] == sorted(curve[top:], reverse=True)
    assert curve[0] > 0
    assert min(curve) >= min(floor, 1 / (warmup + 1)) * 2e-5 * (1 - 1e-9)
    if warmup < total:
        assert max(curve) == pytest.approx(2e-5, rel=1e-9)
        assert schedule.floor_lr == pytest.approx(max(floor * 2e-5, 0.0), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("change", [extend_warmup, lower_peak])
def test_a_changed_linear_schedule_still_decays_to_zero(change: Callable[[Schedule, int], Schedule]) -> None:
    schedule = a_schedule("linear", floor=0.0)
    changed = change(schedule, 120)
    before, after = lr_curve(schedule), lr_curve(changed)
    assert after[:120] == before[:120]
    assert after[120] < 0.7 * before[120]
    assert 0 < after[-1] <= before[-1] * 1.5
    assert lr_at(changed, 1000) == 0.0
    assert Schedule.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_without_a_warm_up_linear_needs_a_floor_and_cosine_starts_at_the_peak() -> None:
    assert lr_curve(a_schedule("linear", total=4, warmup=0, floor=0.0)) == pytest.approx([2e-5, 1.5e-5, 1e-5, 5e-6])
    with pytest.raises(RequestError, match="ends at its starting value"):
        a_schedule("linear", warmup=0)
    assert lr_curve(a_schedule("linear", total=1, warmup=0)) == [2e-5]
    assert lr_curve(a_schedule("cosine", warmup=0))[:2] == [2e-5, 2e-5]
    assert lr_curve(a_schedule("constant", total=5, warmup=0)) == [2e-5] * 5
    assert lr_curve(a_schedule("wsd", total=10, warmup=0))[0] == 2e-5


def test_the_json_always_has_the_warm_up_type_and_the_peak_in_both_blocks() -> None:
    blocks = deepspeed_blocks(a_schedule("linear"))
    assert blocks["optimizer"] == {"type": "AdamW", "params": {"lr": 2e-5}}
    assert blocks["scheduler"] == {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 1000,
            "warmup_num_steps": 100,
            "warmup_type": "linear",
            "warmup_min_lr": 2e-5 / 101,
            "warmup_max_lr": 2e-5,
        },
    }
    cosine = deepspeed_blocks(a_schedule("cosine"), "Lion")
    assert cosine["optimizer"]["type"] == "Lion"
    assert cosine["scheduler"]["params"] == {
        "total_num_steps": 1000,
        "warmup_num_steps": 100,
        "warmup_type": "linear",
        "warmup_min_ratio": pytest.approx(1 / 101, rel=1e-14),
        "cos_min_ratio": 0.1,
    }
    for shape in ("constant", "linear", "cosine"):
        for warmup in (1, 2, 50):
            assert "warmup_type" in deepspeed_blocks(a_schedule(shape, warmup=warmup))["scheduler"]["params"]
    assert deepspeed_blocks(a_schedule("wsd"))["scheduler"] is None


def test_step_drops_by_its_factors() -> None:
    schedule = a_schedule("step", decay_at=[300, 0.6], decay_factor=[0.5, 0.1])
    assert [lr_at(schedule, u) / 2e-5 for u in (299, 300, 599, 600, 999)] == pytest.approx([1, 0.5, 0.5, 0.05, 0.05])
    assert schedule.floor_lr == pytest.approx(1e-6)


@pytest.mark.parametrize("decay", ["linear", "1-sqrt"])
def test_wsd_is_constant_and_then_decays_without_an_update_at_zero(decay: str) -> None:
    schedule = a_schedule("wsd", decay_start=0.8, decay=decay)
    assert {lr_at(schedule, u) for u in range(100, 800)} == {2e-5}
    middle = {"linear": 0.5, "1-sqrt": 1 - 0.5**0.5}[decay]
    assert lr_at(schedule, 900) == pytest.approx(2e-5 * middle)
    assert 0 < lr_at(schedule, 999) < 2e-5 / 100
    assert lr_at(schedule, 1000) == 0.0


def test_cosine_restarts_return_to_the_peak() -> None:
    schedule = a_schedule("cosine_restarts", cycles=3, floor=0.2)
    assert [lr_at(schedule, u) for u in (100, 400, 700)] == [2e-5] * 3
    assert lr_at(schedule, 250) == pytest.approx(2e-5 * 0.6)
    assert 0.2 * 2e-5 < lr_at(schedule, 699) < 0.21 * 2e-5


def test_compound_joins_its_segments_without_a_jump() -> None:
    curve = lr_curve(a_schedule("compound"))
    assert curve[100:500] == [2e-5] * 400
    assert curve[650] == pytest.approx(2e-5 * 0.6)
    assert curve[800] == pytest.approx(2e-5 * 0.2)
    assert max(abs(a - b) for a, b in pairwise(curve[100:])) < 2e-5 / 100


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("linaer", {}, "did you mean linear"),
    ("linear", {"peak_lr": 0.0}, "above 0"),
    ("linear", {"peak_lr": float("nan")}, "above 0"),
    ("linear", {"peak_lr": "1e-5"}, "above 0"),
    ("linear", {"warmup_updates": -1}, "0 or more"),
    ("linear", {"warmup_updates": 10.0}, "whole number"),
    ("linear", {"total_updates": 0}, "1 update or more"),
    ("linear", {"warmup_type": "cubic"}, "linear"),
    ("cosine", {"floor": 1.5}, "from 0 to 1"),
    ("constant", {"floor": 0.1}, "no floor"),
    ("linear", {"cycles": 2}, "no cycles"),
    ("wsd", {"decay_strat": 0.5}, "did you mean decay_start"),
    ("wsd", {"decay": "cubic"}, "1-sqrt"),
    ("wsd", {"decay_start": 1.2}, "not a position"),
    ("step", {"decay_at": [0.5, 0.4]}, "must increase"),
    ("step", {"decay_at": [50]}, "follow the warm-up"),
    ("step", {"decay_at": [0.5], "decay_factor": [0.1, 0.1]}, "2 factors"),
    ("step", {"decay_factor": 2.0}, "not a fraction"),
    ("cosine_restarts", {"cycles": 0}, "1 or more"),
    ("cosine_restarts", {"cycles": 2000}, "do not fit"),
    ("compound", {}, "needs its segments"),
    ("compound", {"segments": [{"kind": "lineer", "to": 0.1}]}, "did you mean linear"),
    ("compound", {"segments": [{"kind": "linear"}]}, "not a fraction"),
    ("compound", {"segments": [{"kind": "linear", "until": 0.5, "to": 0.1}]}, "the run at 1000"),
    ("compound", {"segments": [{"kind": "linear", "unitl": 0.5, "to": 0.1}]}, "no unitl"),
    ("compound", {"segments": [{"kind": "constant", "until": 1.0, "to": 0.5}]}, "stays at 1"),
]


@pytest.mark.parametrize(("shape", "changes", "words"), BAD)
def test_invalid_settings_are_rejected(shape: str, changes: dict[str, Any], words: str) -> None:
    numbers = {"peak_lr": 2e-5, "warmup_updates": 100, "total_updates": 1000, **changes}
    with pytest.raises(RequestError, match=words):
        make_schedule(shape, **numbers)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("update", [30, 99, 100, 130])
def test_a_longer_warm_up_halves_the_learning_rate_which_then_climbs_again(shape: str, update: int) -> None:
    schedule = a_schedule(shape)
    longer = extend_warmup(schedule, update)
    assert longer.extensions == ((update, 2 * max(update, 100)),)
    assert lr_curve(longer)[:update] == lr_curve(schedule)[:update]
    assert lr_at(longer, update) == pytest.approx(lr_at(schedule, update) / 2, rel=0.06)
    peak = 2 * max(update, 100)
    assert lr_at(longer, peak) == pytest.approx(2e-5, rel=1e-5)
    assert lr_at(longer, 999) == pytest.approx(lr_at(schedule, 999), rel=0.3)
    assert live_attributes(longer, update)["warmup_num_steps"] == peak
    assert warmup_at(longer, update - 1) == 100


def test_a_second_extension_builds_on_the_first_up_to_half_the_run() -> None:
    twice = extend_warmup(extend_warmup(a_schedule("linear"), 120), 200)
    assert twice.extensions == ((120, 240), (200, 480))
    assert extend_warmup(a_schedule("linear"), 260).extensions == ((260, 500),)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lowered_peak_halves_the_extended_curve_from_that_update_on(shape: str) -> None:
    schedule = a_schedule(shape)
    longer, lowered = extend_warmup(schedule, 120), lower_peak(schedule, 120)
    assert lr_curve(lowered) == [*lr_curve(schedule)[:120], *(lr / 2 for lr in lr_curve(longer)[120:])]
    assert Schedule.from_dict(lowered.to_dict()) == lowered
    assert deepspeed_blocks(lowered, update=120)["optimizer"]["params"]["lr"] == schedule.peak_lr / 2
    assert deepspeed_blocks(lowered, update=119)["optimizer"]["params"]["lr"] == schedule.peak_lr


def test_late_in_the_run_only_the_learning_rate_is_halved() -> None:
    schedule = a_schedule("cosine")
    lowered = lower_peak(lower_peak(schedule, 600), 700)
    assert [lr_at(lowered, u) / lr_at(schedule, u) for u in (599, 600, 699, 700, 999)] == [1, 0.5, 0.5, 0.25, 0.25]
    assert warmup_at(lowered, 999) == 100


@pytest.mark.parametrize("update", [450, 600, 999])
def test_an_extension_too_late_to_lower_the_learning_rate_is_rejected(update: int) -> None:
    with pytest.raises(RequestError, match="would not lower"):
        extend_warmup(a_schedule("linear"), update)


def test_after_the_run_the_learning_rate_stays_at_its_end() -> None:
    for shape in SHAPES:
        schedule = a_schedule(shape)
        assert lr_at(schedule, 1000) == lr_at(schedule, 5000) == pytest.approx(schedule.floor_lr)
    with pytest.raises(RequestError):
        lr_at(a_schedule("linear"), -1)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.sampled_from([s for s in SHAPES if s not in ("step", "compound")]),
    total=st.integers(1, 400),
    data=st.data(),
)
def test_learning_rates_are_between_zero_and_the_peak(shape: str, total: int, data: Any) -> None:
    warmup = data.draw(st.integers(1, total))
    if shape == "cosine_restarts" and 0 < total - warmup < 2:
        return
    peak = data.draw(st.floats(1e-8, 1e-2))
    kind = data.draw(st.sampled_from(["linear", "log"]))
    schedule = make_schedule(shape, peak_lr=peak, warmup_updates=warmup, total_updates=total, warmup_type=kind)
    curve = lr_curve(schedule)
    assert all(0 < lr <= peak * (1 + 1e-12) for lr in curve)
    ramp = curve[: warmup + (shape != "cosine")]
    # A log ramp reaches the peak one update early, up to the last bit.
    assert all(before <= after * (1 + 1e-12) for before, after in pairwise(ramp))


def test_the_package_imports_only_the_standard_library() -> None:
    modules = list(Path(launcher.schedule.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("launcher.schedule") or name == "launcher.errors"
                assert own or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
