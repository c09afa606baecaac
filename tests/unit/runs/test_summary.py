"""The summary that a run prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole
from launcher.runs.outcome import Outcome
from launcher.runs.summary import print_summary
from tests.unit.inputs import plan_of


def test_the_summary_skips_damaged_evaluation_lines(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "tiny")
    lines = ['{"update": 0, "loss": "nan"}', "{}", '{"update": 8, "loss": 1.25}', '{"update": 9, "lo']
    run.evaluations_file.write_text("\n".join(lines))
    console = RunConsole(Console(width=500, record=True))
    print_summary(plan_of(), run, console, Outcome("finished", 8))
    text = console.console.export_text()
    assert "evaluation loss  nan before, 1.2500 after" in text
    assert "skipped 1 damaged line of evaluations.jsonl" in text


def test_the_summary_has_the_share_of_the_time_that_updates_took(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "tiny")
    times = ("2026-01-01T00:00:00.000Z", "2026-01-01T00:01:20.000Z")
    run.events_file.write_text("".join(f'{{"event": "x", "time": "{time}"}}\n' for time in times))
    run.metrics_file.write_text("".join(f'{{"update": {n}, "step_seconds": 6.0}}\n' for n in range(10)))
    console = RunConsole(Console(width=500, record=True))
    print_summary(plan_of(), run, console, Outcome("finished", 10))
    assert "time             1 min 20 s, of which updates took 75%" in console.console.export_text()
