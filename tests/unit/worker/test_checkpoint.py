"""Saving checkpoints: which rank lists which file, and which checkpoints are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunFailed
from launcher.job.kept_checkpoints import removable
from launcher.job.schema import CheckpointSection
from launcher.manifest import evaluation_loss, files_in, read_manifest
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


LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.0, 60: 4.0}


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({}, [50, 60]),
        ({"keep": 1}, [60]),
        ({"keep": 9}, [10, 20, 30, 40, 50, 60]),
        ({"keep": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep": 1, "keep_best": 1}, [50, 60]),
        ({"keep": 1, "keep_best": 2}, [20, 50, 60]),
        ({"keep": 1, "keep_best": 9}, [10, 20, 40, 50, 60]),
        ({"keep": 2, "keep_every": 30, "keep_best": 3}, [20, 30, 40, 50, 60]),
    ],
)
def test_what_is_kept(section: dict[str, int], kept: list[int]) -> None:
    gone = removable(LOSSES, CheckpointSection(**section))
    assert [update for update in LOSSES if update not in gone] == kept


def test_the_order_is_that_of_samples() -> None:
    """After a change of the batch size, newer checkpoints can have lower numbers."""
    assert removable({90: None, 100: None, 60: None}, CheckpointSection(keep=1)) == [90, 100]


def test_milestones_and_the_best_are_kept(run: RunDir) -> None:
    plan = small_plan(checkpoint={"every": 2, "keep": 1, "keep_every": 5, "keep_best": 1}, data={"eval": "eval.jsonl"})
    losses = {2: 2.5, 4: 1.5, 6: float("nan"), 8: 2.0, 10: 3.0}
    checkpoints = Checkpoints(run, plan, fake_ranks(), ignored)
    for update in range(1, 13):
        if update in losses:
            checkpoints.evaluated(update, losses[update])
        if checkpoints.due(update):
            checkpoints.save(SavingEngine(0), Progress(update, 8 * update), plan.sha256, {})
    assert run.complete_checkpoints() == [4, 5, 10, 12]
    assert [evaluation_loss(run.checkpoint(update)) for update in (4, 5, 10, 12)] == [1.5, None, 3.0, None]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(run: RunDir, loss: float) -> None:
    plan = small_plan(checkpoint={"keep": 1, "keep_best": 1}, data={"eval": "eval.jsonl"})
    checkpoints = Checkpoints(run, plan, fake_ranks(), ignored)
    for update in (1, 2):
        checkpoints.evaluated(update, loss)
        checkpoints.save(SavingEngine(0), Progress(update, 8 * update), plan.sha256, {})
    assert run.complete_checkpoints() == [2]


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_rank_of_an_attempt_that_was_given_up_completes_no_checkpoint(
    run: RunDir, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was cut off may still write to the shared directory after its run has restarted elsewhere."""
    plan, engine = small_plan(), SavingEngine(0)
    monkeypatch.setenv("LAUNCHER_ATTEMPT", str(run.begin_attempt()))
    checkpoints = Checkpoints(run, plan, fake_ranks(), ignored)
    checkpoints.save(engine, Progress(4, 32), plan.sha256, {})
    if when == "before":
        run.begin_attempt()
    else:
        written = engine.save_checkpoint
        monkeypatch.setattr(engine, "save_checkpoint", lambda *a, **k: (written(*a, **k), run.begin_attempt()))
    with pytest.raises(RunFailed, match="attempt 1 of the run was given up, and attempt 2 has started"):
        checkpoints.save(engine, Progress(8, 64), plan.sha256, {})
    assert run.complete_checkpoints() == [4]
