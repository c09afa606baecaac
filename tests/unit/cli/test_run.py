"""What `launcher run` shows and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import launcher.cli.run as run_verb
from launcher.cli.console import RunConsole
from launcher.cli.run import _summarise
from launcher.errors import FailureCode, LauncherError
from launcher.run_dir import RunDir
from launcher.runs.supervisor import Outcome
from tests.unit.inputs import plan_of
from tests.unit.run_directories import Built


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "runs")


def test_a_failure_that_cannot_be_written_is_still_the_one_that_is_raised(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(_progress: Any, _log: Any) -> Any:
        built.run.events_file.unlink()
        built.run.events_file.symlink_to("/dev/full")
        raise LauncherError("the first error", code=FailureCode.PREPARE_FAILED)

    job = tmp_path / "job.yaml"
    job.write_text("name: tiny\n")
    with pytest.raises(LauncherError, match=r"^the first error$") as raised:
        run_verb._planned(make, job, [], built.run, RunConsole())
    assert (raised.value.exit_status, raised.value.code) == (1, "prepare_failed")
    told = " ".join(capsys.readouterr().out.split())
    assert "the failure could not be written to" in told and "No space left on device" in told
    assert built.run.state()["code"] == "prepare_failed"


def test_the_summary_of_a_run_survives_damaged_evaluations(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "tiny")
    lines = ['{"update": 0, "loss": "nan"}', "{}", '{"update": 8, "loss": 1.25}', '{"update": 9, "lo']
    run.evaluations_file.write_text("\n".join(lines))
    console = RunConsole(Console(width=500, record=True))
    _summarise(plan_of(), run, console, Outcome("finished", 8))
    text = console.console.export_text()
    assert "evaluation loss  nan before, 1.2500 after" in text
    assert "evaluations.jsonl has 1 damaged line, which is skipped" in text
