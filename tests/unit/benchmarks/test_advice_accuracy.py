"""The advice must be better than a constant on organisations that it was not fitted on, and rarely too high."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from launcher.schedule.peak import BASES, QUANTILE

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


def test_held_out_error_is_below_the_best_constants(benchmark_module: ModuleType) -> None:
    results = benchmark_module.evaluate(benchmark_module.read_recipes(), benchmark_module.read_sweep())
    scores = results["all but LoRA"]
    assert scores["advice, held out"].mean_abs_log_error < scores["best constant"].mean_abs_log_error
    assert scores["advice, held out"].mean_abs_log_error < scores["constant, held out"].mean_abs_log_error


def test_the_advice_is_rarely_more_than_twice_too_high(benchmark_module: ModuleType) -> None:
    # The goal is 8%; 7 of 81 recipes are 8.6%. docs/learning-rate.md has the frontier.
    results = benchmark_module.evaluate(benchmark_module.read_recipes(), benchmark_module.read_sweep())
    scores = results["all but LoRA"]
    assert scores["advice, held out"].too_high < 0.55 * scores["best constant"].too_high
    assert scores["advice, held out"].too_high < 0.09
    assert scores["advice, shipped"].too_high < 0.09


def test_the_lora_advice_costs_at_most_2_thousandths_of_a_nat_on_the_sweep(benchmark_module: ModuleType) -> None:
    regrets = benchmark_module.sweep_regrets(benchmark_module.read_sweep())
    assert regrets["advice, shipped"] <= 0.002
    assert regrets["advice, shipped"] < 0.5 * regrets["constant 0.0002"]


def test_the_regret_is_exact_at_the_swept_learning_rates_and_grows_below_them(benchmark_module: ModuleType) -> None:
    models = {swept.model: swept for swept in benchmark_module.read_sweep()}
    llama = models["meta-llama/Llama-3.2-1B"]
    assert llama.regret(2e-4) == 0.0316
    assert llama.regret(3e-4) == pytest.approx(0.0203)
    assert llama.regret(1e-3) == 0.0
    assert 0.0 < llama.regret(5e-4) < 0.0203
    assert llama.regret(1e-4) > 0.0316


def test_a_prediction_is_not_fitted_on_its_own_organisation(benchmark_module: ModuleType) -> None:
    recipes, sweep = benchmark_module.read_recipes(), benchmark_module.read_sweep()
    own = [r for r in recipes if r.organisation == "ai2" and not r.example]
    changed = [replace(r, peak_lr=r.peak_lr * 100) if r.organisation == "ai2" else r for r in recipes]
    before, after = benchmark_module.held_out(recipes, sweep), benchmark_module.held_out(changed, sweep)
    assert all(before[r.name] == after[r.name] for r in own)
    others = [r if r.organisation == "ai2" else replace(r, peak_lr=r.peak_lr * 100) for r in recipes]
    moved = benchmark_module.held_out(others, sweep)
    assert all(before[r.name] < moved[r.name] for r in own if r.method == "full")


def test_examples_of_vendors_and_frameworks_are_not_fitted_on(benchmark_module: ModuleType) -> None:
    recipes, sweep = benchmark_module.read_recipes(), benchmark_module.read_sweep()
    assert {r.organisation for r in recipes if r.example} >= {"torchtune", "llamafactory", "deepspeed-chat", "litgpt"}
    changed = [replace(r, peak_lr=r.peak_lr * 100) if r.example else r for r in recipes]
    assert benchmark_module.fit(changed, sweep) == benchmark_module.fit(recipes, sweep)


def test_a_fit_without_recipes_is_the_usual_constant(benchmark_module: ModuleType) -> None:
    fitted = benchmark_module.fit([], benchmark_module.read_sweep(), benchmark_module.Variant(factor=None))
    assert fitted.bases == pytest.approx({**benchmark_module.USUAL, "lora": fitted.bases["lora"]})
    assert fitted.later_factor == 1.0


def test_the_shipped_numbers_are_the_fitted_ones(benchmark_module: ModuleType) -> None:
    recipes, sweep = benchmark_module.read_recipes(), benchmark_module.read_sweep()
    assert benchmark_module.fit(recipes, sweep).bases == pytest.approx(BASES, rel=0.02)
    assert benchmark_module.fit(recipes, sweep, benchmark_module.Variant(factor=None)).later_factor < 0.6
    assert QUANTILE < 0.5


def test_every_recipe_names_its_source(benchmark_module: ModuleType) -> None:
    rows = benchmark_module.RECIPES.read_text().splitlines()
    assert len(rows) == len({row.split(",")[0] for row in rows})
    with benchmark_module.RECIPES.open(newline="") as file:
        for row in benchmark_module.csv.DictReader(file):
            assert row["source"], row
            assert row["how_read"], row
            assert row["kind"] in ("model recipe", "vendor example", "framework example"), row


def test_the_command_prints_json() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["scores"]["all"]["advice, held out"]["recipes"] >= 90
    assert all({"best constant", "advice, shipped"} <= set(row) for row in document["scores"].values())
    assert document["regrets"]["advice, shipped"] <= 0.002


def test_the_command_prints_the_constant_in_every_group() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    groups = [line for line in done.stdout.splitlines() if line.endswith("recipes)")]
    assert len(groups) >= 10
    assert done.stdout.count("best constant") == len(groups)
