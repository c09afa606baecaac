from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.schedule.spikes import SpikeDetector, Verdict


def falling(seed: int, updates: int, noise: float = 0.05) -> Iterator[tuple[int, float, float]]:
    """(update, loss, gradient norm) of a normal run: a falling loss with noise, and norms with multiplicative noise."""
    rng = random.Random(seed)
    for update in range(updates):
        loss = 1.5 + 3 * math.exp(-update / 60) + rng.gauss(0, noise)
        yield update, loss, math.exp(rng.gauss(0, 0.4)) * (1 + 9 * math.exp(-update / 10))


def verdicts(detector: SpikeDetector, series: Iterator[tuple[int, float, float]]) -> list[Verdict]:
    return [detector.watch(*numbers) for numbers in series]


def warmed(updates: int = 60, seed: int = 0) -> SpikeDetector:
    detector = SpikeDetector()
    assert {v.kind for v in verdicts(detector, falling(seed, updates))} == {"ok"}
    return detector


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_a_normal_run_raises_no_alarm(seed: int, noise: float) -> None:
    assert [v for v in verdicts(SpikeDetector(), falling(seed, 600, noise)) if v.kind != "ok"] == []


@pytest.mark.parametrize("seed", range(5))
def test_autocorrelated_noise_is_not_a_spike(seed: int) -> None:
    rng, drift, detector = random.Random(seed), 0.0, SpikeDetector()
    for update in range(600):
        drift = 0.7 * drift + rng.gauss(0, 0.05)
        assert detector.watch(update, 2.0 + drift, 1.0 + rng.random()).kind != "spike"


def test_a_constant_loss_and_a_drop_at_a_new_epoch_are_normal() -> None:
    detector = SpikeDetector()
    for update in range(200):
        assert detector.watch(update, 2.0 if update < 100 else 1.2, 1.0).kind == "ok"


def test_one_high_loss_is_an_outlier_and_does_not_change_the_level() -> None:
    detector = warmed()
    verdict = detector.watch(60, 9.0, 1.0)
    assert verdict.kind == "outlier"
    assert "update 60: loss 9" in verdict.reason
    assert detector.watch(61, 2.7, 1.0).kind == "ok"
    assert detector.watch(62, 9.0, 1.0).kind == "outlier"


def test_one_high_gradient_norm_is_an_outlier() -> None:
    verdict = warmed().watch(60, 2.6, 1000.0)
    assert verdict.kind == "outlier"
    assert "gradient norm 1000" in verdict.reason


@pytest.mark.parametrize("seed", range(5))
def test_a_sustained_rise_is_a_spike_within_three_updates(seed: int) -> None:
    detector = warmed(seed=seed)
    kinds = [detector.watch(60 + k, 7.0 + 0.1 * k, 1.0).kind for k in range(3)]
    assert kinds == ["outlier", "outlier", "spike"]


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_climb_without_outliers_is_a_spike(seed: int) -> None:
    rng, detector = random.Random(seed), SpikeDetector()
    kinds = []
    for update in range(200):
        climb = max(0, update - 120) * 0.06
        kinds.append(detector.watch(update, 2.0 + climb + rng.gauss(0, 0.1)).kind)
    assert "spike" not in kinds[:121]
    assert "spike" in kinds[121:160]


@pytest.mark.parametrize("seed", range(10))
def test_a_small_step_in_strong_noise_is_a_spike(seed: int) -> None:
    rng, detector = random.Random(seed), SpikeDetector()
    kinds = [detector.watch(u, rng.gauss(2.65 if u < 70 else 3.3, 0.12)).kind for u in range(110)]
    assert "spike" not in kinds[:70]
    assert "spike" in kinds[70:]


RECORDED = json.loads((Path(__file__).parents[3] / "benchmarks" / "spike_guard.json").read_text())["runs"]


@pytest.mark.parametrize("run", [run for run in RECORDED if run["remedy"] == "warn"], ids=lambda r: str(r["peak"]))
def test_the_detector_reports_recorded_runs_that_diverged_and_no_others(run: dict[str, Any]) -> None:
    detector = SpikeDetector()
    series = enumerate(zip(run["losses"], run["norms"], strict=True))
    spikes = [update for update, (loss, norm) in series if detector.watch(update, loss, norm).kind == "spike"]
    assert spikes == run["spikes"]
    assert bool(spikes) == (run["final"] > run["first"])


def test_an_early_rise_is_detected_while_the_loss_still_falls() -> None:
    detector = SpikeDetector()
    kinds = []
    for update, loss, norm in falling(3, 40):
        kinds.append(detector.watch(update, loss + (3 if update >= 30 else 0), norm).kind)
    assert kinds[:30] == ["ok"] * 30
    assert "spike" in kinds[30:34]


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (math.nan, None)]
)
def test_nan_or_inf_is_a_spike_at_once(loss: float, norm: float | None) -> None:
    for detector in (SpikeDetector(), warmed()):
        verdict = detector.watch(60, loss, norm)
        assert verdict.kind == "spike"
        assert "NaN or Inf" in verdict.reason


def test_detection_starts_after_24_updates() -> None:
    for known in (10, 23, 24):
        detector = warmed(known)
        assert detector.watch(known, 50.0, 1.0).kind == ("outlier" if known >= 24 else "ok")


def test_after_a_spike_the_detector_cools_down_and_then_detects_again() -> None:
    detector = SpikeDetector(cooldown=40)
    for update, loss, norm in falling(1, 60):
        detector.watch(update, loss, norm)
    detector.cool_down(59)
    rng = random.Random(2)
    kinds = [detector.watch(u, 5.0 + rng.gauss(0, 0.1) + (u == 95) * 8, 1.0).kind for u in range(60, 140)]
    assert set(kinds) == {"ok"}
    assert detector.watch(140, 30.0, 1.0).kind == "outlier"
    detector.cool_down(140)
    assert detector.watch(141, math.nan, 1.0).kind == "spike"


def test_the_state_survives_json_and_gives_the_same_verdicts() -> None:
    whole, first = SpikeDetector(), SpikeDetector()
    series = [(u, loss + (4 if u >= 70 else 0), norm) for u, loss, norm in falling(5, 90)]
    expected = verdicts(whole, iter(series))
    verdicts(first, iter(series[:71]))
    second = SpikeDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert verdicts(second, iter(series[71:])) == expected[71:]
    assert "spike" in {v.kind for v in expected[71:]}


def test_loss_alone_is_enough() -> None:
    detector = SpikeDetector()
    for update, loss, _ in falling(4, 60):
        assert detector.watch(update, loss).kind == "ok"
    assert detector.watch(60, 20.0).kind == "outlier"


def test_memory_stays_within_the_window() -> None:
    detector = SpikeDetector(window=64)
    verdicts(detector, falling(0, 500))
    state = detector.state_dict()
    assert max(len(state["loss"]["values"]), len(state["norm"]["deviations"])) == 64


@pytest.mark.parametrize(
    "numbers", [{"window": 10}, {"minimum": 4}, {"minimum": 200}, {"deviations": 0.0}, {"sustained": 0}]
)
def test_invalid_numbers_are_rejected(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        SpikeDetector(**numbers)  # type: ignore[arg-type]
