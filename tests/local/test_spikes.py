"""Yielding to spikes: the warm-up grows inside DeepSpeed's scheduler, is written down, and survives a resume."""

from __future__ import annotations

import pytest

from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, read_manifest
from tests.local.rank_runs import WORKER, logs, merged, plan_of, run_directory, run_ranks

pytestmark = pytest.mark.local

FAULTY = ("-P", "-m", "tests.local.faulty_worker")
UPDATES = 120


def spiking(job_dict, tmp_path, stop_at=None, **schedule):
    """A run whose losses jump at update 40; every rank sees the same."""
    plan = plan_of(merged(job_dict, train={"max_steps": UPDATES}, schedule={"warmup": 20, "peak_lr": 3e-4, **schedule}))
    run = run_directory(plan, tmp_path)
    fault = {"LAUNCHER_FAULT": "losses_jump:40"}
    events = run_ranks(plan, run, command=FAULTY, stop_at=stop_at, environments={0: fault, 1: fault})
    assert [event["code"] for event in events if event["report"] == "exit"] == [0, 0], logs(run)
    return plan, run, events


def of_kind(run: RunDir, kind: str) -> list[dict]:
    return [event for event in run.events() if event["event"] == kind]


@pytest.mark.parametrize("shape", ["linear"])
def test_a_spike_lengthens_the_warm_up_once_and_halves_the_rate(job_dict, tmp_path, shape):
    plan, run, _ = spiking(job_dict, tmp_path, shape=shape, on_spike="extend_warmup")
    assert [event["update"] for event in of_kind(run, "outlier")] == [40, 41]
    assert [event["update"] for event in of_kind(run, "spike")] == [42]
    (extended,) = of_kind(run, "warmup_extended")
    assert (extended["update"], extended["warmup_updates"]) == (43, 60)

    rates = [line["lr"] for line in run.metrics()]
    (revision_file,) = run.plan_revisions()
    revision = Plan.from_json(revision_file.read_text())
    before, after = planned_lrs(plan), planned_lrs(revision)
    assert rates == [after(u) for u in range(UPDATES)]
    assert rates[:43] == [before(u) for u in range(43)]
    # WarmupDecayLR's ramp begins at 1/21 of the peak and is at 43/60 of its way; the old curve had begun to fall.
    assert rates[43] < 0.95 * before(43)
    assert rates[43] < rates[50] < rates[59]
    assert revision.sha256 == extended["plan_sha256"] != plan.sha256


@pytest.mark.parametrize("shape", ["cosine"])
def test_a_spike_lowers_the_peak_where_asked(job_dict, tmp_path, shape):
    plan, run, _ = spiking(job_dict, tmp_path, shape=shape, on_spike="lower_peak")
    (extended,) = of_kind(run, "warmup_extended")
    assert (extended["update"], extended["warmup_updates"], extended["peak_lr"]) == (43, 60, 1.5e-4)
    (revision_file,) = run.plan_revisions()
    before, after = planned_lrs(plan), planned_lrs(Plan.from_json(revision_file.read_text()))
    made = [line["lr"] for line in run.metrics()]
    assert made == [before(u) if u < 43 else after(u) for u in range(UPDATES)]
    assert made[43] < 0.55 * before(43)
    assert 1.4e-4 < max(made[43:]) <= 1.5e-4


CHANGED = [("cosine", "lower_peak")]


@pytest.mark.parametrize(("shape", "remedy"), CHANGED)
def test_a_changed_schedule_survives_a_resume(job_dict, tmp_path, shape, remedy):
    _, run, events = spiking(job_dict, tmp_path, stop_at=60, shape=shape, on_spike=remedy)
    made = len(run.metrics())
    assert 60 < made < UPDATES
    (revision_file,) = run.plan_revisions()
    checkpoint = run.checkpoint(made)
    manifest = read_manifest(checkpoint)
    revision = Plan.from_json(revision_file.read_text())
    assert manifest["plan_sha256"] == revision.sha256

    start = Start(checkpoint=str(checkpoint), update=made, samples=manifest["samples"])
    environment = {"LAUNCHER_PLAN": str(revision_file)}
    events = run_ranks(revision, run, start=start, command=WORKER, environments={0: environment, 1: environment})
    assert [event["code"] for event in events if event["report"] == "exit"] == [0, 0], logs(run)
    after = planned_lrs(revision)
    assert [line["lr"] for line in run.metrics()] == [after(u) for u in range(UPDATES)]


def test_a_spike_with_warn_is_told_and_changes_nothing(job_dict, tmp_path):
    plan, run, _ = spiking(job_dict, tmp_path, on_spike="warn")
    planned = planned_lrs(plan)
    assert [event["update"] for event in of_kind(run, "spike")] == [42]
    assert [line["lr"] for line in run.metrics()] == [planned(u) for u in range(UPDATES)]
    assert run.plan_revisions() == []


def test_a_spike_with_stop_saves_and_stops(job_dict, tmp_path):
    _, run, events = spiking(job_dict, tmp_path, on_spike="stop")
    ((stopped, code),) = {(event["reason"], event["code"]) for event in events if event["report"] == "stopped"}
    assert "a spike, and schedule.on_spike is stop" in stopped and code == "loss_spike"
    assert len(run.metrics()) == 43
    assert run.complete_checkpoints() == [43]


def test_no_more_extensions_than_asked(job_dict, tmp_path):
    _, run, _ = spiking(job_dict, tmp_path, max_extensions=0)
    assert of_kind(run, "warmup_extended") == []
    assert "the warm-up was already extended 0 times" in of_kind(run, "not_extended")[0]["reason"]


def test_a_loss_that_is_no_number_stops_before_its_update(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 10}))
    run = run_directory(plan, tmp_path)
    fault = {"LAUNCHER_FAULT": "loss_is_nan:6"}
    events = run_ranks(plan, run, command=FAULTY, environments={0: fault, 1: fault})
    ((reason, code),) = {(event["reason"], event["code"]) for event in events if event["report"] == "stopped"}
    assert (reason, code) == ("the loss of update 6 is nan; the weights are those before this update", "nan_loss")
    assert len(run.metrics()) == 6
    assert run.complete_checkpoints() == [6]
