"""Inputs that once ended in a traceback, found by the other tests of this folder with more inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.show_error import show_error
from launcher.ds_config import from_job
from launcher.errors import LauncherError, Problem, RequestError
from launcher.job import load_job
from launcher.job.slurm import gres_gpus
from launcher.lr_report.deepspeed_json import deepspeed_report
from launcher.lr_report.report import report_json
from launcher.watch.terminal_safe import coloured, plain
from tests.unit.fuzz.test_deepspeed_jsons import complete
from tests.unit.fuzz.test_job_files import plan_of

JOB: dict[str, Any] = {"name": "a", "model": {"name_or_path": "m"}, "data": {"train": "a.jsonl"}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
HUGE = 10**400


def job(**sections: Any) -> dict[str, Any]:
    return {**JOB, **sections}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (job(schedule={"warmup": "9" * 400 + "M tokens"}), "schedule.warmup"),
        (job(schedule={"warmup": "9" * 400}), "schedule.warmup"),
        (job(schedule={"warmup": "9" * 5000}), "schedule.warmup"),
        (job(schedule={"warmup": "²"}), "schedule.warmup"),
        (job(slurm={"time": "9" * 5000}), "slurm.time"),
        (job(train={"max_steps": HUGE}), "train.max_steps: must be less than"),
        (job(train={"max_steps": 10**12}), "train.max_steps: the run has 1000000000000 updates"),
        (job(train={"num_train_epochs": 1e308}), "train.num_train_epochs"),
        (job(train={"max_steps": 4, "gradient_accumulation_steps": HUGE}), "train.gradient_accumulation_steps"),
        (job(deepspeed="x" * 300), "deepspeed: too long for a path"),
        (job(deepspeed={"data_types": {"\ud800": 1}}), "a key must be text"),
        (job(deepspeed={"optimizer": {"type": "Muon", "params": {"lr": []}}}), "optimizer.params.lr"),
    ],
)
def test_job(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan_of(load_job(given))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 2}, "optimizer": {"params": {"fused": True, "lr": 1e-5}}}, "has no such"),
        ({**ADAM, "scheduler": {"type": [], "params": {}}}, "scheduler.type"),
        ({"steps_per_print": -HUGE}, "steps_per_print: a number is too large"),
        ({"zero_optimization": {1: 2}}, "zero_optimization: a key must be text"),
    ],
)
def test_deepspeed_json(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        complete(from_job(config, "job.yaml", "deepspeed"))
    assert words in str(caught.value)


def test_a_key_with_a_dot_whose_value_is_auto() -> None:
    complete(from_job({"gradient.clipping": "auto"}, "job.yaml", "deepspeed"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e308}}}, "optimizer.params.lr: a learning rate is"),
        (
            {
                **ADAM,
                "scheduler": {
                    "type": "OneCycle",
                    "params": {
                        "cycle_min_lr": 1e-6,
                        "cycle_max_lr": 1e-5,
                        "cycle_first_step_size": 2,
                        "decay_step_size": 1,
                        "decay_lr_rate": -1,
                    },
                },
            },
            "cannot be computed: float division by zero",
        ),
    ],
)
def test_learning_rates_that_cannot_be_shown(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    with pytest.raises(RequestError) as caught:
        deepspeed_report(file, (), 50, ())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {**ADAM, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": -1e-6}}},
        {"optimizer": {"params": 5}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}},
    ],
)
def test_learning_rates_that_are_shown(tmp_path: Path, config: dict[str, Any]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    assert json.loads(report_json(deepspeed_report(file, (), 50, ())))["curves"]


def test_a_number_of_gpus_that_is_too_long_is_a_type() -> None:
    assert gres_gpus("gpu:" + "9" * 5000) == 1


def test_text_that_no_terminal_can_show() -> None:
    assert plain("a\ud800b\x1b[2J") == coloured("a\ud800b\x1b[2J") == "ab"


def test_an_error_has_no_control_sequence_and_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(LauncherError("a\x1b[2Jb" + "x" * 5000))
    show_error(RequestError(*(Problem("wrong", key=f"k{n}\x1b]0;t\x07") for n in range(50))))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: abxxx") and len(lines[0]) < 2100
    assert len(lines) == 22 and lines[-1] == "and 30 more problems" and "\x1b" not in "".join(lines)
