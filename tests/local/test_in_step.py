"""Every rank on the plan's rate: a rank that leaves it is named with its host, and the run stops before the update."""

from __future__ import annotations

import json
import socket

import pytest

from launcher.fleet.failures import first_failure
from launcher.plan.learning_rate import planned_lrs
from tests.local.rank_runs import fine_tuned, logs, merged, plan_of, run_directory, run_ranks

pytestmark = pytest.mark.local

FAULTY = ("-P", "-m", "tests.local.faulty_worker")
HOST = socket.gethostname()


def test_a_rank_with_another_plan_is_named_before_training(job_dict, tmp_path):
    plan = plan_of(job_dict)
    run = run_directory(plan, tmp_path)
    altered = plan.model_copy(update={"ds_config": {**plan.ds_config, "gradient_clipping": 2.0}})
    other = tmp_path / "other.json"
    other.write_text(altered.to_json())
    events = run_ranks(plan, run, environments={1: {"LAUNCHER_PLAN": str(other)}})
    messages = [event["message"] for event in events if event["report"] == "failed"]
    assert len(messages) == 2, logs(run)
    for message in messages:
        # Two ranks, two plans: which is the odd one cannot be told, so each one is shown with its host.
        assert "the plan differs between ranks" in message
        assert f"rank 1 on {HOST} has {altered.sha256[:12]}" in message
        assert plan.sha256[:12] in message
    assert {event["code"] for event in events if event["report"] == "failed"} == {"plan_differs"}
    assert run.metrics() == []


def test_a_plan_file_that_was_edited_is_refused(job_dict, tmp_path):
    plan = plan_of(job_dict)
    run = run_directory(plan, tmp_path)
    document = json.loads(run.plan_file.read_text())
    document["plan"]["learning_rate"]["peak_lr"] = 1.0
    run.plan_file.write_text(json.dumps(document))
    events = run_ranks(plan, run)
    failure = first_failure(events)
    assert "plan.json was changed" in failure.error and failure.code == "plan_damaged"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("scheduler_runs_ahead:4", f"rank 1 on {HOST} would make update 5"),
        ("blind_scheduler_runs_ahead:4", f"before update 6 the ranks differ: rank 1 on {HOST} is at update 6"),
    ],
)
def test_a_scheduler_that_leaves_the_plan_in_mid_run_stops_it(job_dict, tmp_path, fault, words):
    schedule = {"warmup": 3, "check_every": 3}
    plan = plan_of(merged(job_dict, train={"max_steps": 12}, schedule=schedule))
    run = run_directory(plan, tmp_path)
    events = run_ranks(plan, run, command=FAULTY, environments={1: {"LAUNCHER_FAULT": fault}})
    messages = [event["message"] for event in events if event["report"] == "failed"]
    assert any(words in message for message in messages), (messages, logs(run))
    assert first_failure(events).code == "out_of_step"
    # Nothing was made at a wrong rate on the rank that is right, and the run did not go on.
    planned = planned_lrs(plan)
    assert [line["lr"] for line in run.metrics()] == [planned(u) for u in range(len(run.metrics()))]
    assert 5 <= len(run.metrics()) <= 6


def test_the_first_rank_that_raises_is_the_one_named(job_dict, tmp_path):
    plan = plan_of(merged(job_dict, train={"max_steps": 12}))
    run = run_directory(plan, tmp_path)
    events = run_ranks(plan, run, command=FAULTY, environments={1: {"LAUNCHER_FAULT": "raises:3"}})
    failure = first_failure(events)
    assert (failure.rank, failure.error) == (1, "RuntimeError: the disk of this node is on fire")


@pytest.mark.parametrize("shape", ["wsd", "compound"])
def test_other_shapes_run_at_its_planned_rates(job_dict, tmp_path, shape):
    segments = [{"kind": "linear", "until": 0.5, "to": 0.5}, {"kind": "cosine", "until": 1.0, "to": 0.1}]
    options = {"segments": segments} if shape == "compound" else {}
    schedule = {"shape": shape, "warmup": 3, "peak_lr": 1e-3, **options}
    plan = plan_of(merged(job_dict, train={"max_steps": 12}, schedule=schedule, cluster={"processes_per_node": 1}))
    run = fine_tuned(plan, tmp_path)
    planned = planned_lrs(plan)
    rates = [line["lr"] for line in run.metrics()]
    assert rates == [planned(u) for u in range(12)]
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[0] == pytest.approx(1e-3 / 4)


def test_a_scheduler_of_the_users_own_json_is_kept_and_driven_as_deepspeed_does(job_dict, tmp_path):
    config = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 8, "warmup_num_steps": 3, "warmup_max_lr": 1e-3, "warmup_type": "linear"},
        },
    }
    job = merged(job_dict, train={"max_steps": 8}, deepspeed=config)
    plan = plan_of({**job, "schedule": {}})
    assert plan.ds_config["scheduler"] == config["scheduler"]
    rates = [line["lr"] for line in fine_tuned(plan, tmp_path).metrics()]
    assert rates[:2] == [0.0, 0.0]
    assert rates[4] == pytest.approx(1e-3)
