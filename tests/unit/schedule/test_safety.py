from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import RequestError
from launcher.schedule.curve import make_schedule
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from launcher.schedule.safety import LIMITS, check_safety, deepspeed_warnings, log_ramp, unsafe_scheduler


def problems(peak: float, method: str, parameters: float, **changes: Any) -> list[str | None]:
    numbers = {"peak_lr": peak, "warmup_updates": 100, "total_updates": 1000, **changes}
    return [p.key for p in check_safety(make_schedule("cosine", **numbers), method=method, parameters=parameters)]


@pytest.mark.parametrize(
    ("peak", "method", "parameters", "unsafe"),
    [
        (5e-5, "full", 7e9, False),
        (6e-5, "full", 7e9, True),
        (6e-5, "full", 1.7e9, False),
        (2e-3, "full", 1.35e8, True),
        (2e-4, "lora", 70e9, False),
        (2e-3, "lora", 7e9, True),
        (5e-7, "preference", 7e9, False),
        (2e-5, "preference", 7e9, True),
        (3e-5, "encoder", 3e8, False),
        (1e-3, "encoder", 3e8, True),
    ],
)
def test_the_limit_of_the_peak_depends_on_method_and_size(
    peak: float, method: str, parameters: float, unsafe: bool
) -> None:
    assert problems(peak, method, parameters) == (["schedule.peak_lr"] if unsafe else [])


def test_a_warm_up_longer_than_the_run_needs_consent_and_a_log_warm_up_does_not() -> None:
    assert problems(1e-5, "full", 7e9, warmup_updates=1001) == ["schedule.warmup"]
    assert problems(1e-5, "full", 7e9, warmup_updates=1000) == []
    assert problems(1e-5, "full", 7e9, warmup_type="log") == []
    schedule = make_schedule("linear", peak_lr=1e-5, warmup_updates=1000, total_updates=5000, warmup_type="log")
    assert "35% of the peak after 10 of 1000" in (log_ramp(schedule) or "")
    assert log_ramp(make_schedule("linear", peak_lr=1e-5, warmup_updates=1000, total_updates=5000)) is None


def test_the_users_scheduler_needs_consent_for_deepspeeds_defaults() -> None:
    def keys(kind: str = "WarmupDecayLR", **params: object) -> list[str | None]:
        found = unsafe_scheduler(kind, params, 1e-5, 1000, method="full", parameters=7e9)
        return [problem.key for problem in found]

    safe = {"total_num_steps": 1000, "warmup_num_steps": 100, "warmup_max_lr": 1e-5, "warmup_type": "linear"}
    assert keys(**safe) == []
    assert keys(**{**safe, "warmup_type": "log"}) == []
    assert keys(**{k: v for k, v in safe.items() if k != "warmup_type"}) == ["scheduler.params.warmup_type"]
    missing_peak = keys(**{k: v for k, v in safe.items() if k != "warmup_max_lr"})
    assert missing_peak == ["scheduler.params.warmup_max_lr", "schedule.peak_lr"]
    assert keys(**{**safe, "warmup_num_steps": 1500, "total_num_steps": 2000}) == ["scheduler.params.warmup_num_steps"]
    assert keys(**{**safe, "total_num_steps": 50}) == ["scheduler.params.total_num_steps"]
    assert keys(**{**safe, "warmup_max_lr": 1e-4}) == ["schedule.peak_lr"]


def test_limits_fall_with_size_within_a_method() -> None:
    for method in {limit.method for limit in LIMITS}:
        rows = [limit for limit in LIMITS if limit.method == method]
        assert rows == sorted(rows, key=lambda row: -row.parameters)
        assert [row.peak_lr for row in rows] == sorted(row.peak_lr for row in rows)
        assert rows[-1].parameters == 0


def test_a_default_peak_a_log_ramp_and_two_updates_at_zero_are_reported() -> None:
    warnings = deepspeed_warnings("WarmupDecayLR", {"total_num_steps": 1000, "warmup_num_steps": 100}, 2e-5, 1000)
    assert any("Updates 0 and 1 both use 0" in line for line in warnings)
    assert any("log ramp is the default" in line and "52% of the peak after 10" in line for line in warnings)
    assert any("default 0.001" in line and "2e-05" in line for line in warnings)
    assert any("2 of 1000 updates have a learning rate of 0" in line for line in warnings)
    lrs = simulate_deepspeed("WarmupDecayLR", {"total_num_steps": 1000, "warmup_num_steps": 100}, 2e-5, 1000)
    assert lrs[:2] == [0.0, 0.0]
    assert max(lrs) == 1e-3


WARNINGS: list[tuple[str, dict[str, Any], str]] = [
    ("WarmupCosineLR", {"total_num_steps": 1000, "warmup_min_ratio": 0.1}, "Update 0 uses 0, whatever"),
    ("WarmupCosineLR", {"total_num_steps": 800, "warmup_num_steps": 10}, "ends at update 800: the last 200"),
    ("WarmupDecayLR", {"total_num_steps": 2000, "warmup_max_lr": 2e-5}, "The decay is for 2000 updates"),
    ("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 100}, "drops straight to its floor"),
    ("WarmupLR", {"warmup_num_steps": 3000}, "longer than the run of 1000"),
    ("WarmupLR", {"warmup_max_lr": 1e-4}, "The peak is the scheduler's 0.0001"),
    ("WarmupLR", {"warmup_type": "cosine"}, "unknown warmup_type 'cosine'"),
    ("WarmupLR", {"last_batch_iteration": 5}, "full learning rate 2e-05"),
    ("WarmupLR", {"warmup_min_lr": -1e-4, "warmup_max_lr": 1e-4, "warmup_num_steps": 3}, "below 0, down to -0.0001"),
    (
        "WarmupCosineLR",
        {"total_num_steps": 1000, "warmup_num_steps": 9, "warmup_min_ratio": -1},
        "a learning rate below 0",
    ),
]


@pytest.mark.parametrize(("kind", "params", "words"), WARNINGS)
def test_other_surprises_are_reported(kind: str, params: dict[str, Any], words: str) -> None:
    warnings = deepspeed_warnings(kind, params, 2e-5, 1000)
    assert any(words in line for line in warnings), warnings


def test_a_simple_scheduler_has_one_warning() -> None:
    params = {
        "total_num_steps": 1000,
        "warmup_num_steps": 100,
        "warmup_type": "linear",
        "warmup_min_lr": 2e-7,
        "warmup_max_lr": 2e-5,
    }
    (warning,) = deepspeed_warnings("WarmupDecayLR", params, 2e-5, 1000)
    assert warning.startswith("Updates 0 and 1 both use 2e-07")


def test_misspelt_names_get_a_suggestion() -> None:
    with pytest.raises(RequestError, match="did you mean WarmupDecayLR"):
        simulate_deepspeed("WarmupDecay", {}, 1e-5, 1)
    with pytest.raises(RequestError, match="did you mean warmup_num_steps"):
        simulate_deepspeed("WarmupLR", {"warmup_steps": 5}, 1e-5, 1)
