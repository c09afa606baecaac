"""A run that fails before its ranks start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode, LauncherError
from launcher.job import LoadedJob
from launcher.plan.inputs import plan_inputs
from launcher.runs import run as run_module
from launcher.runs.console import RunConsole
from launcher.runs.planning import CheckedJob
from tests.unit.inputs import job_of, machine_facts, preset
from tests.unit.run_directories import Built


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "runs")


def test_a_failure_that_cannot_be_written_is_still_raised(
    built: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(_job: Any, **_options: Any) -> Any:
        built.run.events_file.unlink()
        built.run.events_file.symlink_to("/dev/full")
        raise LauncherError("the first error", code=FailureCode.PREPARE_FAILED)

    monkeypatch.setattr(run_module, "make_plan", make)
    checked = CheckedJob(LoadedJob(job_of(), "the job"), plan_inputs(job_of(), preset("zero2"), machine_facts(8)), ())
    with pytest.raises(LauncherError, match=r"^the first error$") as raised:
        run_module.plan_in(built.run, checked, RunConsole())
    assert (raised.value.exit_status, raised.value.code) == (1, "prepare_failed")
    printed = " ".join(capsys.readouterr().out.split())
    assert "the failure could not be written to" in printed and "No space left on device" in printed
    assert built.run.state()["code"] == "prepare_failed"
