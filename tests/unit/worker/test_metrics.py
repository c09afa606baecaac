"""metrics.jsonl and evaluations.jsonl: one line per update, its numbers, and who writes them."""

from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.errors import RunFailed
from launcher.run_dir import RunDir
from launcher.worker import metrics
from launcher.worker.metrics import MetricsWriter
from tests.unit.worker.fake_engine import fake_ranks


class Clock:
    """Seconds that pass only when a test lets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


UPDATE: dict[str, Any] = {
    "update": 0,
    "samples": 32,
    "tokens": 3000,
    "loss": 2.5,
    "lr": 1e-6,
    "grad_norm": 1.25,
    "skipped": False,
    "data_seconds": 0.25,
}


def lines(file: Path) -> list[dict[str, Any]]:
    """Each line as strict JSON, in which there is no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def test_an_update_is_one_line_with_its_time_and_tokens_per_second(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(1.5)
    writer.write(**UPDATE)
    (line,) = lines(run.metrics_file)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    memory = line.pop("peak_memory_bytes")
    assert 0 < memory <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert line == {**UPDATE, "step_seconds": 1.5, "tokens_per_second": 2000.0}


def test_each_update_has_the_time_since_the_one_before(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    for update, seconds in enumerate([2.0, 0.5, 7.0]):
        clock.passes(seconds)
        writer.write(**{**UPDATE, "update": update, "tokens": 100})
    found = [(line["update"], line["step_seconds"], line["tokens_per_second"]) for line in lines(run.metrics_file)]
    assert found == [(0, 2.0, 50.0), (1, 0.5, 200.0), (2, 7.0, 14.3)]


def test_the_utilisation_is_of_one_rank_and_in_relation_to_its_peak(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks(world_size=2), 400.0)
    clock.passes(2.0)
    writer.write(**UPDATE, flops=1.2345678e15)
    (line,) = lines(run.metrics_file)
    assert (line["tflops"], line["mfu"]) == (308.6, 0.7716)


def test_without_a_known_peak_there_is_no_mfu(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(1.0)
    writer.write(**UPDATE, flops=1e9)
    (line,) = lines(run.metrics_file)
    assert line["tflops"] == 0.001 and "mfu" not in line


def test_what_is_done_between_updates_is_left_out_of_their_time(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(100.0)
    writer.restart_clock()
    clock.passes(2.0)
    writer.write(**UPDATE)
    clock.passes(50.0)
    writer.write_evaluation(update=1, loss=2.0, perplexity=7.4, targets=60)
    clock.passes(4.0)
    writer.write(**{**UPDATE, "update": 1})
    assert [line["step_seconds"] for line in lines(run.metrics_file)] == [2.0, 4.0]


@pytest.mark.parametrize(("value", "written"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_nan_and_inf_are_written_as_text(tmp_path: Path, clock: Clock, value: float, written: str) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(1.0)
    writer.write(**{**UPDATE, "loss": value, "grad_norm": value})
    writer.write_evaluation(update=1, loss=value, perplexity=value, targets=60)
    (line,) = lines(run.metrics_file)
    assert (line["loss"], line["grad_norm"], line["lr"]) == (written, written, 1e-6)
    (evaluation,) = lines(run.evaluations_file)
    assert (evaluation["loss"], evaluation["perplexity"], evaluation["targets"]) == (written, written, 60)


def test_a_gradient_norm_that_is_not_known_is_null(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(1.0)
    writer.write(**{**UPDATE, "grad_norm": None})
    (line,) = lines(run.metrics_file)
    assert line["grad_norm"] is None


def test_an_evaluation_is_one_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    MetricsWriter(run, fake_ranks()).write_evaluation(update=3, loss=2.0, perplexity=7.4, targets=60)
    (line,) = lines(run.evaluations_file)
    assert line.pop("time").endswith("Z")
    assert line == {"update": 3, "loss": 2.0, "perplexity": 7.4, "targets": 60}
    assert not run.metrics_file.exists()


def test_only_the_first_rank_writes_and_every_rank_measures(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, fake_ranks(rank=1, world_size=2))
    assert (writer.step_seconds, writer.gpu_memory_used_bytes()) == (0.0, None)
    clock.passes(1.23456789)
    writer.write(**UPDATE)
    assert (writer.step_seconds, writer.gpu_memory_used_bytes()) == (1.234568, None)
    clock.passes(50.0)
    writer.write_evaluation(update=1, loss=2.0, perplexity=7.4, targets=60)
    clock.passes(3.0)
    writer.write(**UPDATE)
    assert writer.step_seconds == 3.0
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_gpu_is_what_torch_has_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {device: 5_000}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 4_000}.__getitem__)
    ranks = SimpleNamespace(device=device, first=True)
    assert MetricsWriter(RunDir(tmp_path), ranks).gpu_memory_used_bytes() == 5_000
    assert metrics.peak_memory_bytes(device) == 4_000


def test_a_rank_of_an_attempt_that_was_given_up_writes_no_line(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was cut off the network, and its run continues elsewhere."""
    run = RunDir(tmp_path)
    monkeypatch.setenv("LAUNCHER_ATTEMPT", str(run.begin_attempt()))
    writer = MetricsWriter(run, fake_ranks())
    clock.passes(1.0)
    writer.write(**UPDATE)
    run.begin_attempt()
    clock.passes(1.0)
    with pytest.raises(RunFailed, match="attempt 1 of the run was given up"):
        writer.write(**{**UPDATE, "update": 1})
    assert [line["update"] for line in lines(run.metrics_file)] == [0]
