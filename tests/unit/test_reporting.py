"""`launcher.report` in a script's process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import launcher
from launcher import reporting
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole, number_text


class Tensor:
    """Behaves like a PyTorch tensor with one element."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        return self._value


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Returns a reader of the run's metrics.jsonl; this process is rank 0, and the agent has closed its pipe."""
    monkeypatch.setattr(reporting, "_last", None)
    read_end, write_end = os.pipe()
    os.close(read_end)
    for name, value in {
        "REPORT_FD": str(write_end),
        "REPORT_PID": str(os.getpid()),
        "RUN_DIR": str(tmp_path),
        "TRAIN_BATCH_SIZE": "4",
    }.items():
        monkeypatch.setenv(f"LAUNCHER_{name}", value)
    monkeypatch.setenv("RANK", "0")
    yield lambda: RunDir(tmp_path).metrics()
    os.close(write_end)


def test_report_does_nothing_outside_a_run(tmp_path: Path) -> None:
    code = "import sys, launcher; launcher.report(step=-1, loss='x'); print(sorted(sys.modules))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAUNCHER_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    modules = set(eval(done.stdout))
    assert modules & {"torch", "ray", "deepspeed", "pydantic", "typer", "rich", "yaml", "psutil"} == set()
    assert list(tmp_path.iterdir()) == []


def test_values_of_several_types_are_written(lines: Any) -> None:
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


def test_a_step_that_decreases_has_no_step_time(lines: Any) -> None:
    for step in (3, 5, 1, 2):
        launcher.report(step=step)
    assert ["step_seconds" in line for line in lines()] == [False, True, False, True]


@pytest.mark.parametrize("name", ["update", "samples", "time", "step_seconds", "peak_memory_bytes"])
def test_reserved_names_are_refused(lines: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: reserved name, written by launcher.report"):
        launcher.report(step=0, **{name: 1.0})
    assert lines() == []


@pytest.mark.usefixtures("lines")
def test_a_line_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    for step in range(3):
        launcher.report(step=step, loss=0.5)
    printed = capsys.readouterr().err
    assert printed.count("launcher.report: metrics are not written") == 1 and "metrics.jsonl" in printed


def test_invalid_tokens_give_no_tokens_per_second(lines: Any) -> None:
    for step, tokens in enumerate([8, float("nan"), "many", 8]):
        launcher.report(step=step, tokens=tokens)
    assert ["tokens_per_second" in line for line in lines()] == [False, False, False, True]


@pytest.mark.parametrize(("first", "kept"), [(3, [0, 1, 2]), (0, [])])
def test_a_restarted_script_replaces_only_the_lines_that_it_repeats(
    lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, kept: list[int]
) -> None:
    for step in range(5):
        launcher.report(step=step, loss=1.0)
    RunDir(tmp_path).rewind(samples=0, update=-1)
    assert lines() == []
    monkeypatch.setattr(reporting, "_last", None)
    monkeypatch.setenv("LAUNCHER_RESTART_COUNT", "1")
    for step in range(first, first + 2):
        launcher.report(step=step, loss=2.0)
    assert [(line["update"], line["loss"]) for line in lines()] == [
        *((step, 1.0) for step in kept),
        *((step, 2.0) for step in range(first, first + 2)),
    ]


ODD: list[Any] = [float("nan"), "nan", "[/]", None, [1.0], {"a": 1}, True, 10**400]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_shows_any_reported_value(terminal: bool) -> None:
    """The console is part of the supervisor's loop, so no value may raise an exception in it."""
    written = io.StringIO()
    console = RunConsole(Console(file=written, force_terminal=terminal, width=200))
    console.total = 1
    with console.closing():
        console.state("training")
        for value in ODD:
            console.update({"update": 0, "loss": value, "lr": value, "tokens_per_second": value})
    shown = written.getvalue()
    if terminal:
        # A bar is drawn as time passes: of the values it shows the last one.
        assert "1/1" in shown and number_text(ODD[-1]) in shown
    else:
        assert "[/]" in shown


@pytest.mark.parametrize(
    ("step", "loss", "error", "words"),
    [
        (-1, 0.5, ValueError, "step must be 0 or more, got -1"),
        (0, [1.0, 2.0], TypeError, "list"),
    ],
)
def test_an_invalid_step_or_value_is_refused(
    lines: Any, step: int, loss: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        launcher.report(step=step, loss=loss)
    assert lines() == []
