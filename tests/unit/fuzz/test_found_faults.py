"""Inputs that once ended in a traceback, or in an error that nobody can read (several modules)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.show_error import show_error
from launcher.ds_config.read import from_job
from launcher.errors import LauncherError, Problem, RequestError
from launcher.job import load_job
from launcher.job.slurm import gres_gpus
from launcher.job.user_path import user_path
from launcher.lr_report.deepspeed_json import deepspeed_report
from launcher.lr_report.report import report_json
from launcher.watch.terminal_safe import coloured, plain
from tests.unit.fuzz.test_ds_configs import CPU, completed
from tests.unit.fuzz.test_job_files import TRAINING, planned
from tests.unit.inputs import command, write_folder
from tests.unit.run_directories import Built

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
DIVIDES_BY_ZERO = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 1e-6,
        "cycle_max_lr": 1e-5,
        "cycle_first_step_size": 2,
        "decay_step_size": 1,
        "decay_lr_rate": -1,
    },
}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"schedule": {"warmup": "9" * 400 + "M tokens"}}, "schedule.warmup"),
        ({"slurm": {"time": "9" * 5000}}, "slurm.time"),
        ({"slurm": {"gres": "gpu:a100:" + "9" * 5000}}, "slurm.gres"),
        (
            {"schedule": {}, "deepspeed": {"optimizer": {"type": "Muon", "params": {"lr": []}}}},
            "deepspeed.optimizer.params.lr: must be a number, found []",
        ),
    ],
)
def test_job(sections: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        planned(load_job({**TRAINING, **sections}))
    assert words in str(caught.value)


def test_a_key_with_a_dot_whose_value_is_auto() -> None:
    completed(from_job({"gradient.clipping": "auto"}, "job.yaml", "deepspeed"), CPU)


def report(folder: Path, config: dict[str, Any], updates: int = 50) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps(config))
    return report_json(deepspeed_report(file, (), updates, ()))


@pytest.mark.parametrize(
    ("config", "updates", "words"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e308}}}, 50, "optimizer.params.lr: a learning rate is"),
        ({**ADAM, "scheduler": DIVIDES_BY_ZERO}, 50, "cannot be computed: float division by zero"),
        (ADAM, 10**9, "--updates: the run has 1,000,000,000 updates, more than 10,000,000"),
    ],
)
def test_learning_rates_that_cannot_be_shown(tmp_path: Path, config: dict[str, Any], updates: int, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        report(tmp_path, config, updates)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {**ADAM, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": -1e-6}}},
        {"optimizer": {"params": 5}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}},
    ],
)
def test_learning_rates_that_are_shown(tmp_path: Path, config: dict[str, Any]) -> None:
    assert json.loads(report(tmp_path, config))["curves"]


def test_a_number_of_gpus_that_is_too_long_is_a_type() -> None:
    assert gres_gpus("gpu:" + "9" * 5000) == 1


@pytest.mark.parametrize("path", ["a/" + "é" * 128, "a/" * 2100])
def test_a_path_that_is_too_long_has_its_key(path: str) -> None:
    with pytest.raises(RequestError, match="--output: File name too long: a/") as caught:
        user_path(path, "--output")
    assert len(str(caught.value)) < 200


def test_text_that_no_terminal_can_show() -> None:
    assert plain("a\ud800b\x1b[2J") == coloured("a\ud800b\x1b[2J") == "ab"


def test_lint_prints_no_control_sequence(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**ADAM, "scheduler": {"type": "WarmupLR\x1b[2J", "params": {"\x1b[1m": 1}}}))
    shown = command("lint", str(file))
    assert shown.status == 2 and "DeepSpeed has no scheduler WarmupLR\n" in shown.out and "\x1b" not in shown.out


def test_a_state_that_no_terminal_can_show(tmp_path: Path) -> None:
    built = Built(tmp_path)
    built.state("a\ud800\x1b[2J", 56.0)
    shown = command("status", str(built.run.path))
    assert shown.status == 0
    shown.out.encode()
    assert "\x1b" not in shown.out


def test_an_error_has_no_control_sequence_and_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(LauncherError("a\x1b[2Jb" + "x" * 5000))
    show_error(RequestError(*(Problem("wrong", key=f"k{n}\x1b]0;t\x07") for n in range(50))))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: abxxx") and len(lines[0]) < 2100
    assert len(lines) == 22 and lines[-1] == "and 30 more problems" and "\x1b" not in "".join(lines)
