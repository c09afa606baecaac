"""A run that is killed at random moments and resumed equals an uninterrupted one.

Losses, learning rates, gradient norms, evaluations and exported weights are equal bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.export_folder import export_fault
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole
from launcher.runs.export import export_saved
from launcher.runs.rest import rest_of
from tests.fork_server import forking
from tests.local.launcher_commands import Command, run_folder, updates_made, write_job
from tests.local.rank_runs import Kill, continued, fine_tuned, logs, merged, plan_of, run_directory, run_ranks
from tests.local.test_export import assert_same_export
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local

UPDATES, SAVED = 16, 3
FAULTY = ("-P", "-m", "tests.local.faulty_worker")
SEED = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
"""Draws the moments of the kills. A failed test prints it; with KILL_SEED set to it the draws are the same."""
MADE = ("update", "samples", "tokens", "loss", "lr", "grad_norm")


@pytest.fixture(scope="session")
def dropout_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with dropout in its attention, which each rank draws from its random state."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return str(folder)


def plan_for(job_dict: dict, model: str, stage: int, sections: dict[str, Any]) -> Plan:
    """A plan of two ranks that accumulate, evaluate and save on the way."""
    train = {"max_steps": UPDATES, "train_micro_batch_size_per_gpu": 2, "eval_every": 4, "weight_decay": 0.1}
    job = merged(
        job_dict,
        model={"name_or_path": model},
        train=train,
        schedule={"peak_lr": 5e-3, "allow_unsafe": True},
        checkpoint={"every": SAVED},
        deepspeed=zero_config(stage),
    )
    return plan_of(merged(job, **sections))


def killed_and_resumed(plan: Plan, folder: Path, draw: random.Random, first: int, **options: Any) -> RunDir:
    """A finished run of the plan whose ranks were killed twice and resumed; the first time after update `first`."""
    run, total = run_directory(plan, folder), plan.length.total_updates
    run_ranks(plan, run, kill=drawn_kill(draw, first, total), **options)
    if not is_finished(run, total):
        resume(run, kill=drawn_kill(draw, run.usable_checkpoints()[-1], total), **options)
    if not is_finished(run, total):
        resume(run, **options)
    assert is_finished(run, total), logs(run)
    return run


def drawn_kill(draw: random.Random, first: int, total: int) -> Kill:
    last = max(first, total - 4)
    kill = Kill(draw.choice([(0,), (1,), (0, 1)]), draw.randint(first, last), draw.uniform(0.0, 0.04))
    print(kill)
    return kill


def is_finished(run: RunDir, total: int) -> bool:
    return total in run.usable_checkpoints() and export_fault(run.export) is None


def resume(run: RunDir, **options: Any) -> None:
    rest = rest_of(run, [], RunConsole())
    if not rest.only_export:
        continued(run, **options)
        return
    with forking():
        export_saved(rest.saved, run.export, print)


def assert_same_run(one: RunDir, other: RunDir) -> None:
    """The same updates, evaluations and weights, bit for bit."""
    ones, others = ([[line[key] for key in MADE] for line in run.metrics()] for run in (one, other))
    assert ones == others
    ones, others = ([[line["update"], line["loss"]] for line in run.evaluations()] for run in (one, other))
    assert ones == others
    assert_same_export(one.export, other.export)


@dataclass(frozen=True)
class Case:
    """The ZeRO stage and job sections of a run, and the update after which its ranks may be killed."""

    stage: int
    sections: dict[str, Any] = field(default_factory=dict)
    first: int = SAVED
    options: dict[str, Any] = field(default_factory=dict)


def remedied(stage: int, updates: int, **schedule: Any) -> Case:
    """A run whose losses jump at update 26, so that the learning rate is changed after update 28; killed after that."""
    sections = {"train": {"max_steps": updates}, "schedule": {"warmup": 10, **schedule}}
    fault = {rank: {"LAUNCHER_FAULT": "losses_jump:26"} for rank in range(2)}
    return Case(stage, sections, first=30, options={"command": FAULTY, "environments": fault})


CASES = {
    "zero_1": Case(1),
    "zero_2_adapters": Case(2, {"model": {"lora": {"r": 4, "dropout": 0.1, "merge": True}}}),
    "zero_3": Case(3),
    "zero_3_lower_peak": remedied(3, 40, shape="cosine", on_spike="lower_peak"),
    "zero_2_extend_warmup": remedied(2, 90, shape="linear", on_spike="extend_warmup"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_killed_ranks_equals_an_uninterrupted_one(name, job_dict, dropout_model, tmp_path):
    print(f"KILL_SEED={SEED}")
    case = CASES[name]
    plan = plan_for(job_dict, dropout_model, case.stage, case.sections)
    draw = random.Random(f"{SEED} {name}")
    run = killed_and_resumed(plan, tmp_path / "killed", draw, case.first, **case.options)
    assert_same_run(run, fine_tuned(plan, tmp_path / "whole", **case.options))
    assert bool(run.plan_revisions()) == bool(case.options)


def test_a_run_with_a_killed_launcher_equals_an_uninterrupted_one(job_dict, dropout_model, tmp_path, shared_ray):
    """It is resumed at once, while its ranks may still be ending."""
    print(f"KILL_SEED={SEED}")
    plan = plan_for(job_dict, dropout_model, 2, {"train": {"max_steps": 40}})
    job = write_job(tmp_path, plan.job.model_dump(mode="json", exclude_unset=True))
    command = Command("run", str(job), folder=tmp_path, **shared_ray)
    made = random.Random(f"{SEED} launcher").randrange(SAVED + 1, 20)
    command.wait_for(lambda: updates_made(tmp_path) >= made)
    command.process.kill()
    run = RunDir(run_folder(tmp_path))
    resumed = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    assert resumed.wait() == 0, resumed.output
    assert_same_run(run, fine_tuned(plan, tmp_path / "whole"))
    assert command.left_behind() == []
