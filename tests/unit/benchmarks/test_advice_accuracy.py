"""The advice must be better than a constant on organisations that it was not fitted on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from launcher.schedule.advice import FAMILIES

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "advice_accuracy.py"


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("advice_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_held_out_error_is_below_the_baselines(benchmark_module: ModuleType) -> None:
    results = benchmark_module.evaluate(benchmark_module.read_recipes())
    for group in ("all", "6B and more", "less than 3B", "full"):
        scores = results[group]
        assert scores["held out"].mean_abs_log_error < 0.9 * scores["baseline"].mean_abs_log_error, group
        assert scores["held out"].within_1_5x > scores["baseline"].within_1_5x, group


def test_a_prediction_is_not_fitted_on_its_own_organisation(benchmark_module: ModuleType) -> None:
    recipes = benchmark_module.read_recipes()
    own = [r for r in recipes if r.organisation == "ai2"]
    changed = [benchmark_module.replace(r, peak_lr=r.peak_lr * 100) if r.organisation == "ai2" else r for r in recipes]
    before, after = benchmark_module.held_out(recipes), benchmark_module.held_out(changed)
    assert all(before[r.name] == after[r.name] for r in own)
    assert any(before[r.name] != after[r.name] for r in recipes if r.organisation != "ai2")


def test_the_shipped_bases_are_the_fitted_ones(benchmark_module: ModuleType) -> None:
    fitted = benchmark_module.fit(benchmark_module.read_recipes())
    for method, family in FAMILIES.items():
        assert family.base_lr == pytest.approx(fitted[method].base_lr, rel=0.06), method


def test_every_recipe_names_its_source(benchmark_module: ModuleType) -> None:
    rows = benchmark_module.RECIPES.read_text().splitlines()
    assert len(rows) == len({row.split(",")[0] for row in rows})
    with benchmark_module.RECIPES.open(newline="") as file:
        for row in benchmark_module.csv.DictReader(file):
            assert row["source"], row
            assert row["how_read"], row


def test_the_command_prints_json() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["scores"]["all"]["held out"]["recipes"] >= 43
