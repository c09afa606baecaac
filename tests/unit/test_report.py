"""`launcher.report` in a script's process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher import reporting
from launcher.run_dir import RunDir


class Tensor:
    """What PyTorch's tensor of one element is to Python."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        return self._value


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Reads metrics.jsonl of a run whose first rank is this process; nobody listens to its reports."""
    monkeypatch.setattr(reporting, "_last", None)
    ears, mouth = os.pipe()
    os.close(ears)
    for name, value in {"REPORT_FD": str(mouth), "RUN_DIR": str(tmp_path), "TRAIN_BATCH_SIZE": "4"}.items():
        monkeypatch.setenv(f"LAUNCHER_{name}", value)
    monkeypatch.setenv("RANK", "0")
    yield lambda: RunDir(tmp_path).metrics()
    os.close(mouth)


def test_outside_a_run_nothing_is_done_and_nothing_heavy_imported(tmp_path: Path) -> None:
    code = "import sys, launcher; launcher.report(step=-1, loss='x'); print(sorted(sys.modules))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAUNCHER_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    modules = set(eval(done.stdout))
    assert modules & {"torch", "ray", "deepspeed", "pydantic", "typer", "rich", "yaml", "psutil"} == set()
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_any_kind_are_written_down(lines: Any) -> None:
    launcher.report(step=2, loss=Tensor(0.25), lr=None, skipped=True, phase="late", worst=Tensor(float("inf")))
    (line,) = lines()
    assert {name: line[name] for name in ("update", "samples", "loss", "skipped", "phase", "worst")} == {
        "update": 2,
        "samples": 12,
        "loss": 0.25,
        "skipped": True,
        "phase": "late",
        "worst": "inf",
    }
    assert "lr" not in line and "step_seconds" not in line


def test_a_count_that_goes_back_has_no_step_time(lines: Any) -> None:
    for step in (3, 5, 1, 2):
        launcher.report(step=step)
    assert ["step_seconds" in line for line in lines()] == [False, True, False, True]


@pytest.mark.parametrize(
    ("step", "loss", "error", "words"),
    [
        (-1, 0.5, ValueError, "step counts from 0, got -1"),
        (0, [1.0, 2.0], TypeError, "list"),
    ],
)
def test_what_is_no_update_or_no_number_is_refused(
    lines: Any, step: int, loss: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        launcher.report(step=step, loss=loss)
    assert lines() == []
