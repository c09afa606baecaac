"""Saving checkpoints: which rank lists which file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunFailed
from launcher.manifest import files_in, read_manifest
from launcher.run_dir import RunDir
from launcher.worker.checkpoint import Checkpoints, Progress
from tests.unit.worker.fake_engine import FakeRanks, SavingEngine, fake_ranks, on_each_rank, small_plan


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "tiny")


def ignored(_: Any) -> None:
    """An event that the test does not need."""


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_file_is_listed_by_one_rank(run: RunDir, world_size: int) -> None:
    plan = small_plan()

    def save(ranks: FakeRanks) -> Path:
        checkpoints = Checkpoints(run, plan, ranks, ignored)
        return checkpoints.save(SavingEngine(ranks.rank), Progress(update=4, samples=32), plan.sha256, {})

    assert on_each_rank(world_size, save) == [run.checkpoint(4)] * world_size
    manifest = read_manifest(run.checkpoint(4))
    assert manifest is not None
    names = [
        f"{name}{rank:02d}{end}"
        for name, end in (("optim-", ".pt"), ("offloaded_tensors/rank", "/states.swp"))
        for rank in range(world_size)
    ]
    expected = sorted([*names, "model.pt", *(f"random-{rank}.pt" for rank in range(world_size))])
    assert list(manifest["files"]) == files_in(run.checkpoint(4)) == expected


def test_a_deepspeed_that_writes_in_another_way_stops_the_run(run: RunDir) -> None:
    engine, plan = SavingEngine(0), small_plan()
    del engine.checkpoint_engine
    with pytest.raises(RunFailed, match="this DeepSpeed has no checkpoint_engine"):
        Checkpoints(run, plan, fake_ranks(), ignored).save(engine, Progress(4, 32), plan.sha256, {})
    assert run.complete_checkpoints() == []
