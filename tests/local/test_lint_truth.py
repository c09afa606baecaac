"""What lint says of the table of JSONs for CPUs is what real engines do with them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from launcher.ds_config import Decisions, catalogue, compose, from_mapping
from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS, needed_packages
from launcher.ds_config.target import Device
from launcher.errors import RequestError
from launcher.prepare.machine import missing_packages
from tests.local.engine_verdicts import NOT_COMPILED, WORLD_SIZE
from tests.unit.ds_config.failing_jsons import FINE, REFUSED

pytestmark = pytest.mark.local


def completed(config: dict[str, Any], device: Device = "cpu") -> dict[str, Any]:
    """The JSON as a plan completes it; as far as needed where the plan's values contradict it."""
    user = from_mapping(config, "ds.json")
    adam = {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    batch = 2 * WORLD_SIZE
    try:
        return compose(
            user,
            Decisions(
                **sizes,
                train_batch_size=batch,
                precision="bf16" if (config.get("bf16") or {}).get("enabled") else "fp32",
                device=device,
                optimizer={"type": "AdamW", "params": adam},
                scheduler=None,
                gradient_clipping=1.0,
                hidden_size=16,
                total_num_steps=8,
                warmup_num_steps=2,
            ),
        ).config
    except RequestError:
        optimizer = {"type": "AdamW", "params": {**adam, "torch_adam": True}}
        return {"optimizer": optimizer, **config, "train_batch_size": batch, **sizes}


def engines(configs: list[dict[str, Any]]) -> list[str | None]:
    """What came of an engine with each of the configs: its first error, or None."""
    command = [sys.executable, "-m", "tests.local.engine_verdicts"]
    done = subprocess.run(command, input=json.dumps(configs), text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[str | None] = json.loads(done.stdout)
    return answers


def test_an_engine_fails_on_what_lint_refuses_and_runs_what_it_does_not() -> None:
    missing = missing_packages(MONITORS_AND_OPTIMIZERS)
    failing = [
        row.config
        for row in REFUSED
        if row.seen and "cpu" in row.where and needed_packages(row.config).keys() <= missing
    ]
    configs = [*failing, *FINE]
    answers = engines([completed(config) for config in configs])
    wrong = []
    for config, answer in zip(configs, answers, strict=True):
        assert NOT_COMPILED not in (answer or ""), config
        if (answer is not None) is not (config in failing):
            wrong.append((config, answer))
    assert wrong == []


def test_the_shipped_catalogue_is_what_the_installed_deepspeed_answers() -> None:
    """Where it is of other versions it is asked itself, and this test has nothing to compare."""
    shipped = json.loads(catalogue.SHIPPED.read_text())
    if (metadata.version("deepspeed"), catalogue._torch_version()) != (shipped["deepspeed"], shipped["torch"]):
        pytest.skip("another DeepSpeed or PyTorch is installed")
    assert catalogue._ask_deepspeed() == shipped
