"""What `launcher resume` reports when a run cannot be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run_dir import RunDir, write_manifest
from tests.unit.inputs import command, plan_of, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_resume_reports_a_missing_checkpoint_and_an_altered_plan(folder: Path) -> None:
    run = RunDir.create(folder / "runs", "tiny")
    plan = plan_of()
    run.plan_file.write_text(plan.to_json())
    ended = command("resume", str(run.path))
    assert (ended.status, "no complete checkpoint" in ended.err) == (2, True)

    run.checkpoint(1).mkdir()
    write_manifest(run.checkpoint(1), update=1, samples=8, world_size=8, plan_sha256=plan.sha256)
    run.plan_file.write_text(run.plan_file.read_text().replace('"seed": 42', '"seed": 43'))
    ended = command("resume", str(run.path))
    assert (ended.status, "plan.json was changed" in ended.err) == (1, True)
    assert "Traceback" not in ended.err


def test_an_unusable_file_is_reported_without_a_traceback(folder: Path) -> None:
    run = RunDir.create(folder / "runs", "tiny")
    run.plan_file.write_text(plan_of().to_json())
    run.lock_file.mkdir()
    ended = command("resume", str(run.path))
    assert (ended.status, ended.err) == (1, f"error: {run.lock_file}: Is a directory\n")
