"""Health checks of real runs: their figures in events.jsonl, and a device that computes wrongly."""

from __future__ import annotations

import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import Command, run_folder, write_job
from tests.local.rank_runs import merged
from tests.wrong_products import wrong_products

pytestmark = pytest.mark.local


def health_of(run: RunDir) -> list[dict]:
    return [event for event in run.events() if event["event"] == "health"]


def test_a_run_records_the_figures_of_its_node(job_dict, tmp_path, shared_ray):
    job = merged(job_dict, train={"max_steps": 1}, cluster={"health_checks": "full"}, export=False)
    command = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    run = RunDir(run_folder(tmp_path))
    (health,) = health_of(run)
    (matmul,) = health["matmuls"]
    assert (matmul["device"], matmul["wrong"], matmul["error"]) == ("CPU", 0, None)
    assert matmul["tflops"] > 0 and health["disk_bytes_per_second"] > 0
    assert (health["failed"], health["gpus"], health["links"]) == ([], [], {})
    assert not list(run.path.glob(".write-test-*"))
    order = [event["event"] if event["event"] == "health" else event.get("state") for event in run.events()]
    assert order.index("starting") < order.index("health") < order.index("training")


def test_a_node_that_multiplies_wrongly_is_refused_before_ranks_start(job_dict, tmp_path, shared_ray):
    env = wrong_products(tmp_path / "faulty")
    job = merged(job_dict, train={"max_steps": 1, "restarts": 3}, cluster={"health_checks": "full", "env": env})
    command = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **shared_ray)
    assert command.wait() == 1, command.output
    run = RunDir(run_folder(tmp_path))
    (health,) = health_of(run)
    named = f"node 0 ({health['host']}): CPU multiplies wrongly (wrong elements of a known product: "
    assert named in command.output
    assert (run.state()["state"], run.state()["code"]) == ("failed", "node_faulty")
    assert [(each["check"], each["refuses"]) for each in health["failed"]] == [("matmul", True)]
    assert not list(run.logs.glob("*/rank-*.log")), "no rank was started"
    why = Command("why", str(run.path), folder=tmp_path)
    assert why.wait() == 0 and named in why.output and "a GPU or node is faulty" in why.output
