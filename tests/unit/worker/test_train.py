"""The training loop on a fake engine: means over accumulation and ranks, what is written, and when it stops."""

from __future__ import annotations

import math
import os
import shutil
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.errors import FailureCode
from launcher.plan.schema import Plan
from launcher.records import RankReport
from launcher.run_dir import RunDir
from launcher.token_store import TokenStore, TokenWriter
from launcher.worker.lr_check import OutOfSyncError
from launcher.worker.prefetch import THREAD_NAME
from launcher.worker.ranks import Ranks
from launcher.worker.train import TrainLoop
from tests.unit.inputs import data_facts, job_of, machine_facts, plan_of
from tests.unit.worker.fake_engine import VOCABULARY, FakeEngine, on_each_rank

RANKS, MICRO_BATCH, ACCUMULATION = 2, 2, 3
BATCH = RANKS * MICRO_BATCH * ACCUMULATION
SAMPLES, UPDATES = 30, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of 2 to 9 tokens, with 1 to 8 learned ones; no two are alike in both."""
    folder = tmp_path_factory.mktemp("data") / "train"
    rng = np.random.RandomState(0)
    with TokenWriter(folder) as writer:
        for number in range(SAMPLES):
            length = 2 + number % 8
            learned = [0, 1, *(int(rng.rand() < 0.5) for _ in range(length - 2))]
            writer.add([int(token) for token in rng.randint(1, VOCABULARY, length)], learned)
    return folder


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """However training ends."""
    yield
    assert THREAD_NAME not in [thread.name for thread in threading.enumerate()]


def plan_with(data: Path, **schedule: Any) -> Plan:
    train = {"max_steps": UPDATES, "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": MICRO_BATCH}
    job = job_of(
        train=train,
        cluster={"gpus_per_node": 0, "processes_per_node": RANKS},
        schedule={"shape": "constant", "warmup": 2, "peak_lr": 3e-5, "on_spike": "stop", **schedule},
    )
    plan = plan_of(job, data=data_facts(SAMPLES, folder=str(data)), machine=machine_facts(0))
    assert (plan.gradient_accumulation_steps, plan.length.total_updates) == (ACCUMULATION, UPDATES)
    return plan


class Trained:
    """One rank that trained on a fake engine, and its reports."""

    def __init__(self, run: RunDir, plan: Plan, ranks: Ranks, engine: FakeEngine, stop_at: int | None = None) -> None:
        self.engine, self.reports = engine, []  # type: FakeEngine, list[RankReport]
        self._stop, self._stop_at = threading.Event(), stop_at
        control: Any = SimpleNamespace(stop=self._stop, report=self._report, record_event=lambda _event: None)
        self.training = TrainLoop(run, plan, ranks, engine, control, [f"h{rank}" for rank in range(RANKS)])
        self.training.train()

    def _report(self, report: RankReport) -> None:
        self.reports.append(report)
        if report["report"] == "update" and report["update"] == self._stop_at:
            self._stop.set()


def trained(tmp_path: Path, plan: Plan, stop_on: dict[int, int] | None = None, **faults: Any) -> list[Any]:
    """All ranks, trained. `stop_on` are the updates after which ranks get the order to stop."""
    run = RunDir(tmp_path)
    return on_each_rank(
        RANKS,
        lambda ranks: Trained(run, plan, ranks, FakeEngine(plan, **faults), (stop_on or {}).get(ranks.rank)),
    )


def sequences(data: Path, seed: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, learned) in the order in which updates take them: epoch after epoch."""
    store = TokenStore(data)
    order = [s for epoch in range(3) for s in np.random.RandomState([seed, epoch]).permutation(SAMPLES)]
    return [tuple(part.tolist() for part in store[int(sample)]) for sample in order]  # type: ignore[misc]


def token_loss(before: int) -> float:
    """The fake engine gives token 0 the logit before / 10, and the others, one of which is the target, 0."""
    return math.log(math.exp(before / 10) + VOCABULARY - 1)


def test_the_loss_is_the_mean_over_the_learned_tokens_of_all_ranks_and_micro_batches(
    tmp_path: Path, data: Path
) -> None:
    plan = plan_with(data)
    first, second = trained(tmp_path, plan)
    found = RunDir(tmp_path).metrics()
    assert [line["update"] for line in found] == list(range(UPDATES))
    assert [line["samples"] for line in found] == [BATCH * (update + 1) for update in range(UPDATES)]
    all_sequences = sequences(data, plan.job.train.seed)
    for update, line in enumerate(found):
        taken = all_sequences[update * BATCH : (update + 1) * BATCH]
        losses = [
            token_loss(before)
            for tokens, learned in taken
            for before, is_learned in zip(tokens, learned[1:], strict=False)
            if is_learned
        ]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert line["tokens"] == sum(len(tokens) for tokens, _ in taken)
        # Each micro-batch's loss, averaged by DeepSpeed over accumulation and ranks, adds up to the same mean.
        part = slice(update * ACCUMULATION, (update + 1) * ACCUMULATION)
        given = [*first.engine.losses[part], *second.engine.losses[part]]
        assert len(given) == RANKS * ACCUMULATION
        assert sum(given) / len(given) == pytest.approx(line["loss"], rel=1e-6)
    assert [line["lr"] for line in found] == pytest.approx([1e-5, 2e-5, 3e-5, 3e-5, 3e-5], rel=1e-12)
    assert not any("router_loss" in line for line in found)
    assert all(0 < line["data_seconds"] <= line["step_seconds"] for line in found)
    assert not first.training.stopped and not second.training.stopped


def test_every_rank_reports_every_update_to_its_agent(tmp_path: Path, data: Path) -> None:
    for rank in trained(tmp_path, plan_with(data)):
        updates = [report for report in rank.reports if report["report"] == "update"]
        assert [report["update"] for report in updates] == list(range(UPDATES))
        assert set(updates[0]) == {"report", "time", "update", "step_seconds", "gpu_memory_used_bytes", "own_seconds"}
        assert all(report["step_seconds"] >= report["own_seconds"] > 0 for report in updates)


def test_all_ranks_stop_after_the_same_update_when_one_of_them_is_asked(tmp_path: Path, data: Path) -> None:
    """The order reaches rank 1 after update 1; the sum that all ranks see is that of update 2."""
    for rank in trained(tmp_path, plan_with(data), {1: 1}):
        assert rank.training.stopped
        assert rank.training.progress.update == 3
        assert rank.training.guard.stop_reason is None
    assert len(RunDir(tmp_path).metrics()) == 3


def test_an_order_to_stop_in_the_last_update_leaves_the_run_finished(tmp_path: Path, data: Path) -> None:
    for rank in trained(tmp_path, plan_with(data), {0: UPDATES - 2}):
        assert not rank.training.stopped
        assert rank.training.progress.update == UPDATES


def test_a_skipped_update_is_written_as_skipped_and_stops_the_run(tmp_path: Path, data: Path) -> None:
    for rank in trained(tmp_path, plan_with(data), norms={2: math.nan}, skips=(2,)):
        assert rank.training.stopped
        assert rank.training.guard.stop_code is FailureCode.NAN_LOSS
    found = RunDir(tmp_path).metrics()
    assert [(line["skipped"], line["grad_norm"]) for line in found] == [(False, 1.0), (False, 1.0), (True, "nan")]


def test_a_loss_that_is_nan_stops_before_its_update(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce = TrainLoop.reduce

    def nan_in_update_3(self: TrainLoop, summed: Any, batch: Any) -> tuple[float, bool]:
        mean, stop = reduce(self, summed, batch)
        return math.nan if batch.update == 3 else mean, stop

    monkeypatch.setattr(TrainLoop, "reduce", nan_in_update_3)
    for rank in trained(tmp_path, plan_with(data)):
        assert rank.training.stopped
        assert rank.training.guard.stop_code is FailureCode.NAN_LOSS
        assert (rank.training.progress.update, rank.engine.global_steps) == (3, 3)
    assert len(RunDir(tmp_path).metrics()) == 3


def test_a_rank_with_another_learning_rate_raises_before_its_update(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TrainLoop.advance

    def runs_ahead(self: TrainLoop, batch: Any, *numbers: Any) -> None:
        advance(self, batch, *numbers)
        if batch.update == 0 and self.ranks.rank == 1:
            self.engine.lr_scheduler.step()

    monkeypatch.setattr(TrainLoop, "advance", runs_ahead)
    _, error = trained(tmp_path, plan_with(data))
    assert type(error) is OutOfSyncError
    assert "rank 1 on h1" in str(error)
    assert "rank 0" not in str(error)


def test_an_error_of_the_data_is_raised_in_training(tmp_path: Path, data: Path) -> None:
    """The offsets lack the end of the last sequence, which the first three updates use."""
    damaged = tmp_path / "damaged"
    shutil.copytree(data, damaged)
    os.truncate(damaged / "offsets.i64", 8 * SAMPLES)
    for error in trained(tmp_path, plan_with(damaged)):
        assert type(error) is IndexError
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert "train" in frames and frames[-1] == "lengths"
    assert len(RunDir(tmp_path).metrics()) < 3
