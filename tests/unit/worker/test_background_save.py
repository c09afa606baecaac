"""Checkpoints that are written in the background: when they are complete, what they contain, and failures."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.manifest import content_fault, file_records, files_in, read_manifest
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.worker.checkpoint import Checkpoints, Progress
from tests.unit.worker.fake_engine import WAIT_SECONDS, FakeRanks, on_each_rank, small_plan


class Writer:
    """Writes as torch.save does, once the gate is open; or raises `error`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        assert self.gate.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error
        torch.save(state_dict, path)


class TensorEngine:
    """Saves one tensor per rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.weight, self.checkpoint_engine = rank, torch.zeros(4), Writer()

    def save_checkpoint(self, save_dir: Path, tag: str, **_: Any) -> None:
        folder = Path(save_dir) / tag
        folder.mkdir(exist_ok=True)
        self.checkpoint_engine.save({"weight": self.weight}, str(folder / f"optim-{self.rank}.pt"))


class Rank:
    """One rank that trains: an update adds 1 to its tensor."""

    def __init__(self, run: RunDir, plan: Plan, ranks: FakeRanks) -> None:
        self.events: list[int] = []
        self.engine, self.ranks, self.done = TensorEngine(ranks.rank), ranks, 0
        self.checkpoints = Checkpoints(run, plan, ranks, lambda event: self.events.append(event["update"]))

    def update(self) -> float:
        """Makes an update. Returns how many ranks had written their files before it."""
        (written,) = self.ranks.sum([float(self.checkpoints.written)])
        self.checkpoints.agree(written)
        self.engine.weight += 1
        self.done += 1
        return written

    def save(self, **options: Any) -> Path:
        return self.checkpoints.save(self.engine, Progress(self.done, 8 * self.done), "0" * 64, {}, **options)

    def until_written(self) -> None:
        """Waits until this rank has written its files; training would make updates meanwhile."""
        pending = self.checkpoints._pending
        assert pending is not None
        pending.files.exception(WAIT_SECONDS)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "tiny")


def on_ranks(run: RunDir, size: int, function: Callable[[Rank], Any]) -> list[Any]:
    plan = small_plan(checkpoint={"keep": 2})

    def result(ranks: FakeRanks) -> Any:
        rank = Rank(run, plan, ranks)
        try:
            return function(rank)
        finally:
            rank.engine.checkpoint_engine.gate.set()

    return on_each_rank(size, result)


def test_a_checkpoint_is_complete_once_all_ranks_have_written(run: RunDir) -> None:
    def train(rank: Rank) -> list[Any]:
        gate = rank.engine.checkpoint_engine.gate
        rank.update()
        rank.save(background=True)
        if rank.ranks.rank == 0:
            gate.set()
            rank.until_written()
        rank.ranks.barrier()
        found = [rank.update(), rank.update(), run.complete_checkpoints()]
        rank.ranks.barrier()
        gate.set()
        rank.until_written()
        rank.ranks.barrier()
        found.append(rank.update())
        rank.checkpoints.wait()
        return [*found, run.complete_checkpoints(), rank.events]

    first, second = on_ranks(run, 2, train)
    assert first == [1, 1, [], 2, [1], [1]]
    assert second == [1, 1, [], 2, [1], []]
    manifest = read_manifest(run.checkpoint(1))
    assert manifest is not None
    assert manifest["files"] == file_records(run.checkpoint(1), files_in(run.checkpoint(1)))
    assert set(manifest["files"]) == {"optim-0.pt", "optim-1.pt", "random-0.pt", "random-1.pt"}
    for rank in range(2):
        # Saved after one update, written after three.
        assert torch.load(run.checkpoint(1) / f"optim-{rank}.pt")["weight"].tolist() == [1, 1, 1, 1]


def test_the_same_files_as_a_save_for_which_training_waits(tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path, "tiny", str(background)) for background in (True, False)]
    for run, background in zip(runs, (True, False), strict=True):

        def train(rank: Rank, background: bool = background) -> None:
            rank.engine.checkpoint_engine.gate.set()
            torch.manual_seed(5)
            rank.update()
            rank.save(background=background)
            rank.checkpoints.wait()

        on_ranks(run, 1, train)
    manifests = [read_manifest(run.checkpoint(1)) or {} for run in runs]
    assert set(manifests[0]["files"]) == {"optim-0.pt", "random-0.pt"}
    assert {**manifests[0], "time": 0} == {**manifests[1], "time": 0}


@pytest.mark.parametrize("background", [True, False])
def test_the_next_save_waits_for_a_pending_one(run: RunDir, background: bool) -> None:
    def train(rank: Rank) -> list[int]:
        rank.update()
        rank.save(background=True)
        threading.Timer(0.1, rank.engine.checkpoint_engine.gate.set).start()
        rank.update()
        rank.save(background=background)
        found = run.complete_checkpoints()
        rank.checkpoints.wait()
        rank.checkpoints.wait()
        return found

    found = on_ranks(run, 2, train)
    assert all(1 in complete for complete in found)
    if not background:
        assert found == [[1, 2], [1, 2]]
    assert run.complete_checkpoints() == [1, 2]


def test_a_second_save_at_the_same_update_waits_for_the_pending_one(run: RunDir) -> None:
    """A stop right after a checkpoint was due."""

    def train(rank: Rank) -> list[int]:
        rank.update()
        rank.save(background=True)
        threading.Timer(0.1, rank.engine.checkpoint_engine.gate.set).start()
        rank.save()
        return run.complete_checkpoints()

    assert on_ranks(run, 2, train) == [[1], [1]]


@pytest.mark.parametrize("by", ["update", "save", "wait"])
def test_a_failed_write_fails_the_run_and_leaves_no_manifest(run: RunDir, by: str) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def train(rank: Rank) -> None:
        writer = rank.engine.checkpoint_engine
        writer.gate.set()
        rank.update()
        rank.save()
        rank.update()
        if rank.ranks.rank == 1:
            writer.error = full
        rank.save(background=True)
        rank.until_written()
        {"update": rank.update, "save": rank.save, "wait": rank.checkpoints.wait}[by]()

    first, second = on_ranks(run, 2, train)
    assert second is full
    assert "waits in collective" in str(first)
    assert run.complete_checkpoints() == [1]
    assert content_fault(run.checkpoint(1)) is None


def test_a_manifest_that_cannot_be_written_fails_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_: Any, **__: Any) -> None:
        raise full

    def train(rank: Rank) -> None:
        rank.engine.checkpoint_engine.gate.set()
        rank.update()
        rank.save(background=True)
        monkeypatch.setattr("launcher.worker.checkpoint.write_manifest", fails)
        rank.until_written()
        rank.update()
        assert rank.checkpoints._completing is not None
        rank.checkpoints._completing.exception(WAIT_SECONDS)
        rank.update()

    assert on_ranks(run, 1, train) == [full]
    assert run.complete_checkpoints() == []


def test_pruning_never_counts_a_pending_checkpoint(run: RunDir) -> None:
    def train(rank: Rank) -> list[list[int]]:
        rank.engine.checkpoint_engine.gate.set()
        found = []
        for _ in range(4):
            rank.update()
            rank.save(background=True)
            found.append(run.complete_checkpoints())
        rank.checkpoints.wait()
        return [*found, run.complete_checkpoints()]

    (found,) = on_ranks(run, 1, train)
    assert [complete[-2:] for complete in found] == [[], [1], [1, 2], [2, 3], [3, 4]]
