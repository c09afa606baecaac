"""Runs a plan's ranks on this machine through an agent, without Ray."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.fleet.agent import Agent, NodeTask
from launcher.fleet.network import LOOPBACK
from launcher.job import load_job
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.prepare.universal import make_universal
from launcher.records import AgentReport
from launcher.run_dir import RunDir, universal_folder, write_atomic, write_json
from launcher.runs.console import RunConsole
from launcher.runs.planning import make_plan
from launcher.runs.rest import Rest, rest_of
from tests.fork_server import SharedStarter, forking
from tests.time_limit import TIME_LIMIT_SECONDS

WORKER = ("-P", "-m", "launcher.worker")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to some ranks, a time after the first of them reports an update."""

    ranks: tuple[int, ...]
    update: int
    delay_seconds: float


def merged(job: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """`job` with keys of its sections replaced."""
    return {
        **job,
        **{k: {**job.get(k, {}), **v} if isinstance(v, dict) and k != "deepspeed" else v for k, v in sections.items()},
    }


def plan_of(job: dict[str, Any]) -> Plan:
    """The job's plan; what is measured for it is kept in the job's cache."""
    with forking():
        return make_plan(load_job(job))


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
    kill: Kill | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    command: tuple[str, ...] = WORKER,
    timeout_seconds: float = TIME_LIMIT_SECONDS,
) -> list[AgentReport]:
    """Every report of the ranks, up to the last exit; with `kill` to the first, when a supervisor ends the others.

    `environments` adds variables to single ranks.
    """
    agent = _Watched(environments or {}, stop_at, kill)
    awaited = 1 if kill else plan.world.size
    task = NodeTask(
        node_rank=0,
        first_rank=0,
        processes=plan.world.size,
        world_size=plan.world.size,
        run_dir=str(run.path),
        log_folder=str(run.node_logs(0, socket.gethostname())),
        environment={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        arguments=command,
        forked=True,
    )
    rendezvous = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(agent.reserve_port(LOOPBACK, listen=True))}
    with forking():
        agent.start(task)
    agent.order({"go": {"env": rendezvous, "start": start.model_dump() if start else None}})
    reports: list[AgentReport] = []
    deadline = time.monotonic() + timeout_seconds
    try:
        while sum(report["report"] == "exit" for report in reports) < awaited:
            assert time.monotonic() < deadline, f"ranks still run after {timeout_seconds} s: {reports[-3:]}"
            for report in agent.next_reports(1.0):
                reports.append(report)
                if report["report"] == "event":
                    run.rank_event(report)
    finally:
        agent.end(1.0)
    return reports


def logs(run: RunDir) -> str:
    """All rank logs, for a failed assertion."""
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(run.logs.glob("*/rank-*.log")))


def fine_tuned(plan: Plan, folder: Path, **options: Any) -> RunDir:
    """The run directory of a plan carried out to its end."""
    run = run_directory(plan, folder)
    events = run_ranks(plan, run, **options)
    assert [event["code"] for event in events if event["report"] == "exit"] == [0] * plan.world.size, logs(run)
    return run


def continued(run: RunDir, *overrides: str, **options: Any) -> tuple[Rest, list[AgentReport]]:
    """Carries out the rest of a run from its newest checkpoint, as `launcher resume` does, without Ray.

    Returns the rest and the reports of its ranks; `options` are those of `run_ranks`.
    """
    rest = rest_of(run, list(overrides), RunConsole())
    plan_file = rest.plan_file or run.next_plan_revision()
    write_atomic(plan_file, rest.plan.to_json())
    checkpoint = Path(rest.start.checkpoint)
    if rest.start.convert:
        with (run.logs / "convert.log").open("ab") as log:
            make_universal(checkpoint, universal_folder(checkpoint), log)
    run.rewind(rest.start.samples, rest.start.update)
    given = options.pop("environments", {})
    environments = {
        rank: {**given.get(rank, {}), "LAUNCHER_PLAN": str(plan_file)} for rank in range(rest.plan.world.size)
    }
    return rest, run_ranks(rest.plan, run, start=rest.start, environments=environments, **options)


class _Watched(Agent):
    """An agent that adds variables to single ranks, orders a stop after an update, and kills ranks after one."""

    def __init__(self, environments: Mapping[int, Mapping[str, str]], stop_at: int | None, kill: Kill | None) -> None:
        super().__init__()
        self._starter = SharedStarter()
        self._environments, self._stop_at, self._kill = environments, stop_at, kill

    def start(self, task: NodeTask) -> list[int]:
        given = self._environments

        class Task(NodeTask):
            def rank_environment(self, local_rank: int) -> dict[str, str]:
                return {**super().rank_environment(local_rank), **given.get(local_rank, {})}

        return super().start(Task(**vars(task)))

    def _receive(self, report: AgentReport) -> None:
        super()._receive(report)
        if report["report"] == "update" and report["update"] == self._stop_at:
            self.order({"stop": True})
        kill = self._kill
        if (
            kill
            and report["report"] == "update"
            and report["update"] == kill.update
            and report["rank"] == kill.ranks[0]
        ):
            threading.Timer(kill.delay_seconds, self._kill_ranks, [kill.ranks]).start()

    def _kill_ranks(self, ranks: tuple[int, ...]) -> None:
        for process in self._processes:
            if process.rank in ranks:
                process.send_signal(signal.SIGKILL)
