"""The part of a run's time that its updates took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.watch.goodput import goodput


def at(seconds: int, **event: object) -> str:
    return json.dumps({"time": f"2026-01-01T00:{seconds // 60:02}:{seconds % 60:02}.000Z", **event})


def a_run(folder: Path, *events: str, updates: int) -> RunDir:
    run = RunDir(folder)
    run.events_file.write_text("\n".join(events) + "\n")
    lines = [json.dumps({"update": number, "step_seconds": 2.0}) for number in range(updates)]
    run.metrics_file.write_text("\n".join(lines) + "\n")
    return run


def test_the_time_until_a_resume_does_not_count(tmp_path: Path) -> None:
    run = a_run(
        tmp_path,
        at(0, event="state", state="planning"),
        at(30, event="state", state="stopped"),
        at(900, event="state", state="placing"),
        at(910, event="state", state="training"),
        at(950, event="state", state="finished"),
        updates=20,
    )
    found = goodput(run)
    assert found is not None
    assert (found.seconds, found.useful_seconds, found.share) == (80.0, 40.0, 0.5)


def test_the_time_after_a_killed_launcher_does_not_count(tmp_path: Path) -> None:
    run = a_run(
        tmp_path,
        at(0, event="state", state="planning"),
        at(20, event="state", state="training"),
        at(900, event="resume", update=5),
        at(920, event="state", state="finished"),
        updates=10,
    )
    found = goodput(run)
    assert found is not None and found.share == pytest.approx(20 / 40)


def test_a_run_without_updates_has_none(tmp_path: Path) -> None:
    assert goodput(a_run(tmp_path, at(0, event="state", state="planning"), at(5, event="x"), updates=0)) is None
