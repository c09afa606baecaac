"""A linear schedule with `floor: 0` on two real ranks: a scheduler object in place of DeepSpeed's WarmupDecayLR."""

from __future__ import annotations

import json
import socket

import pytest

from launcher.plan.learning_rate import planned_lrs
from launcher.plan.schema import Plan
from tests.local.rank_runs import continued, fine_tuned, logs, merged, plan_of, run_directory, run_ranks

pytestmark = pytest.mark.local

FAULTY = ("-P", "-m", "tests.local.faulty_worker")
ZERO = {"shape": "linear", "warmup": 4, "peak_lr": 1e-3, "floor": 0, "check_every": 1}


def test_every_update_has_the_planned_learning_rate_on_both_ranks(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 16}, schedule=ZERO))
    run = fine_tuned(plan, tmp_path)
    assert "scheduler" not in json.loads(run.ds_config_file.read_text())
    lrs = [line["lr"] for line in run.metrics()]
    planned = planned_lrs(plan)
    assert lrs == [planned(update) for update in range(16)]
    assert lrs[0] == pytest.approx(1e-3 / 5)
    assert lrs[4] == max(lrs) == pytest.approx(1e-3)
    assert lrs[4:] == pytest.approx([1e-3 * (16 - update) / 12 for update in range(4, 16)])
    assert planned(16) == 0.0


def test_a_rank_whose_scheduler_runs_ahead_is_named(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 12}, schedule=ZERO))
    run = run_directory(plan, tmp_path)
    events = run_ranks(plan, run, command=FAULTY, environments={1: {"LAUNCHER_FAULT": "scheduler_runs_ahead:4"}})
    failures = [event for event in events if event["report"] == "failed"]
    named = f"before update 5 the ranks differ: rank 1 on {socket.gethostname()} is at update 5"
    assert len(failures) == 2 and all(named in event["message"] for event in failures), logs(run)
    assert len(run.metrics()) == 5


def test_a_resume_on_another_number_of_ranks_continues_to_zero(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 24}, schedule=ZERO))
    run = run_directory(plan, tmp_path)
    run_ranks(plan, run, stop_at=9)
    made = len(run.metrics())
    assert 10 <= made < 24
    rest, events = continued(run, "cluster.processes_per_node=1")
    assert [event["code"] for event in events if event["report"] == "exit"] == [0], logs(run)
    assert rest.plan.world.size == 1
    planned = planned_lrs(plan)
    assert [line["lr"] for line in run.metrics()] == [planned(update) for update in range(24)]


def test_a_resume_can_replace_deepspeeds_class_by_the_object(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 24}, schedule={**ZERO, "floor": "auto"}))
    assert plan.ds_config["scheduler"]["type"] == "WarmupDecayLR"
    run = run_directory(plan, tmp_path)
    run_ranks(plan, run, stop_at=9)
    made = len(run.metrics())
    rest, events = continued(run, "schedule.floor=0")
    assert [event["code"] for event in events if event["report"] == "exit"] == [0, 0], logs(run)
    assert "scheduler" not in rest.plan.ds_config
    before, after = planned_lrs(plan), planned_lrs(rest.plan)
    expected = [before(update) if update < made else after(update) for update in range(24)]
    assert [line["lr"] for line in run.metrics()] == expected
    assert after(24) == 0.0 < before(24)


def test_a_spike_lengthens_the_warm_up_and_the_run_still_ends_near_zero(job_dict, tmp_path):
    schedule = {**ZERO, "warmup": 20, "peak_lr": 3e-4, "on_spike": "lower_peak"}
    plan = plan_of(merged(job_dict, train={"max_steps": 120}, schedule=schedule))
    run = run_directory(plan, tmp_path)
    fault = {"LAUNCHER_FAULT": "losses_jump:40"}
    events = run_ranks(plan, run, command=FAULTY, environments={0: fault, 1: fault})
    assert [event["code"] for event in events if event["report"] == "exit"] == [0, 0], logs(run)
    (revision_file,) = run.plan_revisions()
    before, after = planned_lrs(plan), planned_lrs(Plan.from_json(revision_file.read_text()))
    lrs = [line["lr"] for line in run.metrics()]
    assert lrs == [before(update) if update < 43 else after(update) for update in range(120)]
    assert lrs[43] < 0.6 * before(43)
    assert after(120) == 0.0 < lrs[-1] < 5e-6
