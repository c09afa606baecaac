"""`launcher resume` under another batch, another number of ranks, another schedule."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.plan.learning_rate import planned_rates
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from tests.local.launcher_commands import Command
from tests.local.rank_runs import fine_tuned, merged, plan_of, run_directory, run_ranks
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local

UPDATES = 24


def half_done(plan: Plan, folder) -> RunDir:
    """A run of the plan that was stopped somewhere after update 9."""
    run = run_directory(plan, folder)
    run_ranks(plan, run, stop_at=9)
    assert 10 <= len(run.metrics()) < UPDATES
    return run


def resumed_plan(run: RunDir) -> Plan:
    return Plan.from_json(run.plan_revisions()[-1].read_text())


@pytest.fixture(scope="module")
def whole_runs():
    """Whole runs by their schedule; their losses do not depend on the ZeRO stage."""
    return {}


@pytest.mark.parametrize("stage", [3])
def test_a_resume_on_another_number_of_ranks_equals_one_whole_run(job_dict, tmp_path, shared_ray, whole_runs, stage):
    """Two ranks, then one: accumulation keeps the batch, and losses and learning rates equal those of one whole run."""
    schedule = {"warmup": 6, "peak_lr": 1e-3}
    job = merged(job_dict, train={"max_steps": UPDATES}, schedule=schedule, deepspeed=zero_config(stage))
    plan = plan_of(job)
    if "whole" not in whole_runs:
        whole_runs["whole"] = fine_tuned(plan, tmp_path / "whole")
    whole = whole_runs["whole"]
    run = half_done(plan, tmp_path / "cut")
    command = Command("resume", str(run.path), "cluster.processes_per_node=1", folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    assert "2 → 1 ranks: train_batch_size stays 8, with accumulation 1 → 2." in command.output
    assert resumed_plan(run).world.size == 1
    one, other = run.metrics(), whole.metrics()
    for key in ("update", "samples", "tokens", "lr"):
        assert [line[key] for line in one] == [line[key] for line in other]
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in other], rtol=5e-5)
    assert run.evaluations()[-1]["loss"] == pytest.approx(whole.evaluations()[-1]["loss"], rel=5e-5)


@pytest.mark.parametrize("batch", [16])
def test_a_resume_with_another_batch_keeps_the_learning_rate_of_the_samples_seen(job_dict, tmp_path, shared_ray, batch):
    updates = 100
    train = {"max_steps": updates, "train_batch_size": 8}
    plan = plan_of(merged(job_dict, train=train, schedule={"warmup": 25, "peak_lr": 5e-4}))
    run = run_directory(plan, tmp_path)
    run_ranks(plan, run, stop_at=40)
    made = len(run.metrics())
    overrides = [f"train.train_batch_size={batch}", "export=false", "checkpoint.keep=1", "checkpoint.every=50"]
    command = Command("resume", str(run.path), *overrides, folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    new = resumed_plan(run)
    lines = run.metrics()
    first = lines[made]
    assert f"{made} updates × 8 = {made * 8} samples" in new.resumed.arithmetic
    assert new.resumed.arithmetic in command.output.replace("\n", "")
    assert first["update"] == new.resumed.update
    assert abs(first["update"] - made * 8 / batch) <= 0.5
    assert first["samples"] == made * 8 + batch
    # A larger batch makes fewer updates, so the learning rate matches to within its change in one update.
    assert abs(first["lr"] - planned_rates(plan)(made)) <= 1.01 * plan.learning_rate.peak_lr / (updates - 25)
    assert updates * 8 <= lines[-1]["samples"] < updates * 8 + batch
    planned = planned_rates(new)
    assert [line["lr"] for line in lines[made:]] == [planned(line["update"]) for line in lines[made:]]
    # A larger batch renumbers the updates: the newest checkpoint is the one with the most samples.
    assert run.complete_checkpoints() == [lines[-1]["update"] + 1]


def test_a_resume_with_another_schedule_follows_it_from_the_checkpoint_on(job_dict, tmp_path, shared_ray):
    plan = plan_of(merged(job_dict, train={"max_steps": UPDATES}, schedule={"warmup": 6, "peak_lr": 1e-3}))
    run = half_done(plan, tmp_path)
    made = len(run.metrics())
    command = Command("resume", str(run.path), "schedule.peak_lr=2e-4", folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    planned = planned_rates(resumed_plan(run))
    lines = run.metrics()
    assert [line["update"] for line in lines] == list(range(UPDATES))
    assert [line["lr"] for line in lines[made:]] == [planned(u) for u in range(made, UPDATES)]
    assert max(line["lr"] for line in lines[made:]) <= 2e-4


def test_a_resume_that_is_impossible_is_refused_with_its_reason(job_dict, tmp_path, shared_ray):
    plan = plan_of(merged(job_dict, train={"max_steps": UPDATES}))
    run = half_done(plan, tmp_path)
    for override, words in {
        "train.seed=1": "goes on with the model and the data that it began with",
        "cluster.processes_per_node=3": "train_batch_size 8 does not divide by world size 3",
        "train.max_step=3": "did you mean max_steps?",
    }.items():
        command = Command("resume", str(run.path), override, folder=tmp_path, **shared_ray)
        assert command.wait() == 2
        assert words in command.output
    finished = fine_tuned(plan_of(merged(job_dict, train={"max_steps": 2})), tmp_path / "finished")
    again = Command("resume", str(finished.path), folder=tmp_path, **shared_ray)
    assert again.wait() == 2
    assert "all 2 updates are made already" in again.output
    nothing = Command("resume", str(tmp_path), folder=tmp_path, **shared_ray)
    assert nothing.wait() == 2
    assert "not a run directory" in nothing.output
