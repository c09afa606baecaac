"""Which checkpoint `export: best` exports, and what the user reads if it is not that of the best evaluation."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.export import _default_folder
from launcher.errors import RunFailed
from launcher.manifest import write_manifest
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.runs.best_export import best_checkpoint
from launcher.runs.checkpoints import SavedCheckpoint
from launcher.runs.console import RunConsole
from launcher.runs.outcome import Outcome
from launcher.runs.summary import print_summary
from tests.unit.inputs import job_of, plan_of


def best_plan(export: bool | str = "best") -> Plan:
    checkpoint = {"every": 10, "keep_best": 1}
    return plan_of(
        job_of(
            data={"eval": "eval.jsonl"},
            train={"eval_every": 10, "max_steps": 100},
            checkpoint=checkpoint,
            export=export,
        )
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose lowest loss, 2.0, has the checkpoint after update 20. The lower one of its last line is damaged."""
    run = RunDir.create(tmp_path / "runs", "tiny")
    plan = best_plan()
    run.plan_file.write_text(plan.to_json())
    evaluated(run, {0: 4.0, 10: 3.0, 20: 2.0, 30: 2.5})
    for update, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (35, None)):
        saved(run, plan, update, loss)
    return run


def evaluated(run: RunDir, losses: dict[int, float | str]) -> None:
    lines = [json.dumps({"update": update, "loss": loss}) for update, loss in losses.items()]
    run.evaluations_file.write_text("\n".join([*lines, '{"update": 40, "loss": 1.']))


def saved(run: RunDir, plan: Plan, update: int, loss: float | None) -> None:
    folder = run.checkpoint(update)
    folder.mkdir()
    with zipfile.ZipFile(folder / "model_states.pt", "w") as file:
        file.writestr("data.pkl", bytes(1000))
    facts = {"update": update, "samples": update * plan.train_batch_size, "plan_sha256": plan.sha256, "world_size": 8}
    write_manifest(folder, **facts, **({} if loss is None else {"evaluation_loss": loss}))  # type: ignore[arg-type]


def chosen(run: RunDir) -> tuple[int, str | None]:
    """The update of the exported checkpoint, and the note on it."""
    best = best_checkpoint(run, lambda _: None)
    return best.saved.update, best.note


def test_the_checkpoint_with_the_lowest_loss_is_exported(run: RunDir) -> None:
    assert chosen(run) == (20, None)


def test_of_equal_losses_the_newest_is_exported(run: RunDir) -> None:
    saved(run, best_plan(), 40, 2.0)
    assert chosen(run) == (40, None)


def test_a_loss_that_is_nan_is_not_the_lowest(run: RunDir) -> None:
    evaluated(run, {0: 4.0, 10: "nan", 20: 2.0})
    assert chosen(run) == (20, None)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({0: 1.5, 20: 2.0}, "the lowest evaluation loss, 1.5000, was before the first update"),
        ({0: 4.0, 15: 1.75, 20: 2.0}, "the lowest evaluation loss, 1.7500, was after update 15"),
    ],
)
def test_a_best_evaluation_without_a_checkpoint_is_named(
    run: RunDir, losses: dict[int, float | str], words: str
) -> None:
    evaluated(run, losses)
    update, note = chosen(run)
    assert update == 20 and note is not None and words in note
    assert note.endswith("where no usable checkpoint exists: the best of the existing checkpoints is exported")


def test_a_damaged_best_checkpoint_is_named_and_the_next_best_is_exported(run: RunDir) -> None:
    file = run.checkpoint(20) / "model_states.pt"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    notes: list[str] = []
    best = best_checkpoint(run, notes.append)
    assert best.saved.update == 30
    assert best.note is not None and "the lowest evaluation loss, 2.0000, was after update 20" in best.note
    assert any("update-20 cannot be used: model_states.pt has changed" in note for note in notes)


def test_without_any_loss_the_newest_checkpoint_is_exported(run: RunDir) -> None:
    for update in (10, 20, 30):
        run.checkpoint(update).rename(run.path / f"moved-{update}")
    assert chosen(run) == (35, "no checkpoint has an evaluation loss, so the newest one is exported")


def test_without_checkpoints_nothing_is_exported(run: RunDir) -> None:
    run.checkpoints.rename(run.path / "moved")
    with pytest.raises(RunFailed, match=r"nothing can be exported: .*no complete checkpoint found"):
        best_checkpoint(run, lambda _: None)


@pytest.mark.parametrize(
    ("export", "early_stop", "folder"),
    [
        (True, None, "export-update-20"),
        (True, "early stopping: why", "export"),
        ("last", "early stopping: why", "export"),
        ("best", "early stopping: why", "export-update-20"),
    ],
)
def test_where_launcher_export_writes_by_default(
    run: RunDir, export: bool | str, early_stop: str | None, folder: str
) -> None:
    """RUN/export only if the run itself would export this checkpoint, without options."""
    plan = best_plan(export)
    saved = SavedCheckpoint(run.checkpoint(20), 20, 20, 8, plan, run.plan_file, early_stop)
    assert _default_folder(run, saved, None, False) == run.path / folder
    assert _default_folder(run, saved, "float32", False) == run.path / "export-update-20-float32"


def test_the_summary_names_the_reason_and_the_exported_update(run: RunDir) -> None:
    note = "the lowest evaluation loss, 1.5000, was before the first update"
    run.event({"event": "exported_best", "update": 20, "evaluation_loss": 2.0, "note": note})
    console = RunConsole(Console(width=500, record=True))
    print_summary(best_plan(), run, console, Outcome("finished", 50, "early stopping: it did not improve"))
    text = console.console.export_text()
    assert "finished after 50 updates" in text
    assert "reason           early stopping: it did not improve" in text
    assert f"(update 20, evaluation loss 2.0000; {note})" in text
