"""Runs a plan's ranks on this machine through an agent, without Ray."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.fleet.agent import Agent, Event, NodeTask
from launcher.job import validate_job
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, write_atomic, write_json
from launcher.runs.planning import check_job, make_plan
from tests.fork_server import forking
from tests.time_limit import TIME_LIMIT_SECONDS

WORKER = ("-m", "launcher.worker")


def merged(job: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """`job` with keys of its sections replaced."""
    return {
        **job,
        **{k: {**job.get(k, {}), **v} if isinstance(v, dict) and k != "deepspeed" else v for k, v in sections.items()},
    }


def plan_of(job: dict[str, Any]) -> Plan:
    """The job's plan; what is measured for it is kept in the job's cache."""
    valid = validate_job(job)
    with forking():
        return make_plan(valid, check_job(valid, "test"), lambda _: None)


def run_directory(plan: Plan, folder: Path) -> RunDir:
    """A run directory with the plan in it."""
    run = RunDir.create(folder, plan.job.name)
    write_atomic(run.plan_file, plan.to_json())
    write_json(run.ds_config_file, plan.ds_config)
    return run


def run_ranks(
    plan: Plan,
    run: RunDir,
    *,
    start: Start | None = None,
    stop_at: int | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    command: tuple[str, ...] = WORKER,
    timeout_seconds: float = TIME_LIMIT_SECONDS,
) -> list[dict[str, Any]]:
    """Every event of the ranks, to the last exit. `environments` adds variables to single ranks."""
    agent = _Watched(environments or {}, stop_at)
    task = NodeTask(
        node_rank=0,
        first_rank=0,
        processes=plan.world.size,
        world_size=plan.world.size,
        run_dir=str(run.path),
        log_folder=str(run.node_logs(0, socket.gethostname())),
        environment={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        arguments=command,
    )
    with forking():
        agent.start(task)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.free_port())}
    agent.order({"go": {"env": rendezvous, "start": start.model_dump() if start else None}})
    events: list[dict[str, Any]] = []
    deadline = time.monotonic() + timeout_seconds
    try:
        while sum(event["report"] == "exit" for event in events) < plan.world.size:
            assert time.monotonic() < deadline, f"ranks still run after {timeout_seconds} s: {events[-3:]}"
            for event in agent.next_events(1.0):
                events.append(event)
                if event["report"] == "event":
                    run.event(event["event"], **event["details"])
    finally:
        agent.end(1.0)
    return events


def logs(run: RunDir) -> str:
    """All rank logs, for a failed assertion."""
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(run.logs.glob("*/rank-*.log")))


def fine_tuned(plan: Plan, folder: Path, **options: Any) -> RunDir:
    """The run directory of a plan carried out to its end."""
    run = run_directory(plan, folder)
    events = run_ranks(plan, run, **options)
    assert [event["code"] for event in events if event["report"] == "exit"] == [0] * plan.world.size, logs(run)
    return run


class _Watched(Agent):
    """An agent that adds variables to single ranks, and orders a stop after an update."""

    def __init__(self, environments: Mapping[int, Mapping[str, str]], stop_at: int | None) -> None:
        super().__init__()
        self._environments, self._stop_at = environments, stop_at

    def start(self, task: NodeTask) -> list[int]:
        given = self._environments

        class Task(NodeTask):
            def rank_environment(self, local_rank: int) -> dict[str, str]:
                return {**super().rank_environment(local_rank), **given.get(local_rank, {})}

        return super().start(Task(**vars(task)))

    def _hear(self, event: Event) -> None:
        super()._hear(event)
        if event["report"] == "update" and event["update"] == self._stop_at:
            self.order({"stop": True})
