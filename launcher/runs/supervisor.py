"""The supervisor of one attempt: takes a plan through its states, from placing the nodes to the end of the ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Unpack

from rich.markup import escape

from launcher.errors import FailureCode, RunFailed, code_of, first_line, known_code
from launcher.files import Tail
from launcher.first_failure import (
    lost_peer,
)
from launcher.fleet.agent import NodeTask
from launcher.fleet.draining import DrainWatch, time_left
from launcher.fleet.environment import flight_recorder, rank_environment
from launcher.fleet.failures import Failure, first_failure
from launcher.fleet.hang_detector import HangDetector
from launcher.fleet.network import LOOPBACK
from launcher.fleet.node_failures import OF_DEVICES
from launcher.fleet.nodes import GRACE_SECONDS, Node, Nodes, address_of
from launcher.fleet.preflight import NodeCheck, Requirements, disk_bytes, preflight, raise_problems
from launcher.fleet.ray_head import RayHead, head_of_this_ray
from launcher.fleet.stacks import RankStack
from launcher.plan.packages import needed_packages
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.records import EventReport, PhaseReport, Report, RunState, StateDetails
from launcher.run_dir import RunDir
from launcher.runs.diagnosis import Diagnosis
from launcher.runs.excluded_nodes import exclude_node
from launcher.runs.failure_record import printing_errors
from launcher.runs.imports import begins_imports
from launcher.runs.outcome import Outcome

_SETTLE_SECONDS = 1.0
# Ray's health checks take about fifteen seconds to detect a lost node.
_LOST_NODE_SECONDS = 30.0
_EVENT_TITLES = {
    "outlier": "loss outlier",
    "spike": "loss spike",
    "warmup_extended": "warm-up extended",
    "not_extended": "warm-up not extended",
    "early_stop": "early stop",
}
WORKER = ("-P", "-m", "launcher.worker")


class Console(Protocol):
    """What shows the progress of a run."""

    def state(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def preflight(self, checks: list[NodeCheck]) -> None: ...

    def update(self, metrics: dict[str, Any]) -> None: ...

    def evaluation(self, evaluation: dict[str, Any]) -> None: ...


class RayLost(RunFailed):
    """Ray's head process is gone."""

    code = FailureCode.RAY_LOST


class Supervisor:
    """Executes one plan in one run directory, once. The caller releases the nodes."""

    stop_action = "stopping after this update, then saving"

    def __init__(self, plan: Plan, plan_file: Path, run: RunDir, console: Console, nodes: Nodes) -> None:
        self.plan_file = plan_file
        self.plan, self.run_dir, self.console, self.nodes = plan, run, console, nodes
        self.attempt = 1
        self.failures: list[Failure] = []
        """Of the ranks and nodes, the first one at the start; set when the attempt has failed."""
        self.updates_made = 0
        """The updates of the run that were made, as far as they are written."""
        self.reports: list[Report] = []
        self.stop_signal = 0
        self.phase: str | None = None
        self._head: RayHead | None = None
        self._diagnosis = Diagnosis(run, plan.world.processes_per_node, nodes)
        self._hang_detector = _hang_detector(plan)
        self._hung: list[Failure] = []
        self._noted_late_signal = False
        self._drain_watch: DrainWatch | None = None
        self._drained: Failure | None = None
        self._metrics, self._evaluations = Tail(run.metrics_file), Tail(run.evaluations_file)

    def run(self, start: Start | None = None) -> Outcome:
        """Places the nodes, starts the ranks and waits until all have ended. Raises RunFailed if one fails."""
        if start is not None:
            self.updates_made = start.update
            self._metrics.skip()
            self._evaluations.skip()
        try:
            self.place()
            self.start(start)
            return self.follow()
        finally:
            if self._drain_watch is not None:
                self._drain_watch.end()

    def place(self) -> None:
        self.enter("placing")
        address = address_of(self.plan.job.cluster.address)
        self.nodes.connect(address)
        self._head = head_of_this_ray(own=address == "local")
        self._drain_watch = self._drain_watch or DrainWatch()
        for rank, node in enumerate(self.nodes.place(self.plan.job.cluster.wait_seconds)):
            self.run_dir.event(
                {
                    "event": "node",
                    "node_rank": rank,
                    "host": node.host,
                    "address": node.address,
                    "interface": node.interface,
                    "gpus": list(node.gpus),
                    "clock_offset_seconds": node.clock_offset_seconds,
                }
            )
        for node in self.nodes.spares:
            self.run_dir.event({"event": "spare_node", "host": node.host, "address": node.address})

        if self._forked:
            self.prepare_forks()

    def start(self, start: Start | None) -> None:
        self.prepare_nodes()
        rendezvous = self._reserve_rendezvous(listen=True)
        self.nodes.start([self._task(rank, node) for rank, node in enumerate(self.nodes.nodes)])
        rendezvous |= {"LAUNCHER_PLAN": str(self.plan_file), "LAUNCHER_PLAN_SHA256": self.plan.sha256}
        self.nodes.order({"go": {"env": rendezvous, "start": start.model_dump() if start else None}})

    def prepare_forks(self) -> None:
        """Begins the imports on every node and spare node: the checks before the ranks start overlap with them."""
        tasks = [self._task(rank, node) for rank, node in enumerate(self.nodes.nodes)]
        for node in self.nodes.spares:
            tasks.append(replace(self._task(0, node), log_folder=str(self.run_dir.spare_logs(node.host))))
        self.nodes.with_spares().prepare_forks(tasks)

    def prepare_nodes(self) -> None:
        """Begins the attempt: what precedes the start of its ranks. Raises RunFailed."""
        self.enter("starting")
        self.attempt = self._diagnosis.attempt = self.run_dir.begin_attempt()
        self.check_nodes()
        self.provide_data()

    def check_nodes(self) -> None:
        """Checks the nodes before ranks are started on them. Raises RunFailed, which names each unfit node."""
        versions = self.plan.machine.versions
        packages = needed_packages(self.plan.ds_config)
        cluster = self.plan.job.cluster
        required = Requirements(
            self.plan.world, versions, self._disk_bytes(), os.environ, cluster.env, packages, cluster.health_checks
        )
        checks = preflight(self.nodes.with_spares(), required, self.run_dir)
        self.console.preflight(checks)
        if self._replace_unfit(checks):
            self.check_nodes()
        else:
            raise_problems(checks)

    def _replace_unfit(self, checks: Sequence[NodeCheck]) -> bool:
        """Excludes the nodes with problems, and puts spare nodes in their places. False if there are too few."""
        unfit = [check for check in checks if check.problems]
        if len(unfit) == len(checks):
            return False
        for check in unfit:
            code, text = check.problems[0].code, check.problems[0].text
            if code in OF_DEVICES and self.plan.job.cluster.exclude_after:
                exclude_node(self.run_dir, check.node.host, text)
            if code in OF_DEVICES or len(checks) - len(unfit) >= self.plan.world.nodes:
                self.nodes.exclude(check.node.host, text)
                self.console.note(f"          {escape(f'not using {check.node.host} any more: {text}')}")
        if not unfit or len(checks) - len(unfit) < self.plan.world.nodes:
            return False
        self.place()
        self.enter("starting")
        return True

    def follow(self) -> Outcome:
        """Receives reports until the last rank has ended. Raises RunFailed if a rank fails."""
        ended: dict[int, int] = {}
        for report in self._received():
            if report["report"] == "phase":
                self._phase(report)
            elif report["report"] == "event":
                self._record_event(report)
            elif report["report"] == "exit":
                ended[report["rank"]] = report["code"]
            if first_failure([report]):
                self._fail()
            if len(ended) == self.plan.world.size:
                break
        self._show_progress()
        for report in self.reports:
            if report["report"] == "stopped":
                if self._drained is not None and not self.stopping and report["reason"] is None:
                    raise self._failed([self._drained])
                return Outcome("stopped", report["update"], report["reason"], known_code(report.get("code")))
        for report in self.reports:
            if report["report"] == "event" and report["event"] == "early_stop":
                return Outcome("finished", int(str(report["details"]["update"])), str(report["details"]["reason"]))
        return Outcome("finished", self.plan.length.total_updates)

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self.stop_signal != 0

    def request_stop(self, signal_number: int) -> bool:
        """Makes the ranks stop after the current update, because of a signal. False if they are not training yet."""
        if self.phase is None:
            return False
        self.stop_signal = signal_number
        return True

    def enter(self, state: RunState, **details: Unpack[StateDetails]) -> None:
        """Records a state and shows it."""
        self.run_dir.enter(state, **details)
        self.console.state(state)

    def _received(self) -> Iterator[Report]:
        """Every report of the ranks. In between, shows progress and sends the ranks a requested stop."""
        stop_sent = False
        while True:
            reports = self.nodes.reports(timeout_seconds=0.5)
            # Before the first yield: a caller that breaks at one report must not lose the others.
            self.reports += reports
            yield from reports
            self._show_progress()
            self._check_head()
            self._check_hang()
            self._check_drain()
            if (self.stopping or self._drained) and not stop_sent:
                stop_sent = True
                self.nodes.order({"stop": True})

    def _check_head(self) -> None:
        """Ends the ranks and raises RayLost if Ray's head process is gone.

        Records that first if Ray cannot be replaced: it may end this process soon.
        """
        if self._head is None or not self._head.gone():
            return
        error = RayLost(f"Ray's head process (gcs_server) at {self._head.address} no longer answers")
        if not self.nodes.own_ray:
            with printing_errors(self.console.note, "the failure could not be written to the run directory"):
                self.run_dir.enter("failed", reason=str(error), message=str(error), code=error.code)
        # Calls of agents do not need the head.
        with printing_errors(self.console.note, "the ranks could not be ended"):
            self.nodes.end(GRACE_SECONDS)
        raise error

    def _check_hang(self) -> None:
        """Raises RunFailed if the run hangs: writes the stacks of all ranks first, then ends them."""
        hang = self._hang_detector.check(time.monotonic())
        if hang is None:
            return
        self.console.note(f"          {hang}: writing the stacks of all ranks")
        stacks, absent = self._stacks()
        self._hung = self._diagnosis.of_hang(hang, stacks, absent, time.time())
        self._fail()

    def _stacks(self) -> tuple[list[RankStack] | None, list[int]]:
        """The stacks of all ranks, None if they cannot be read, and the node ranks whose agent did not answer."""
        try:
            return self.nodes.stacks()
        except Exception as error:
            self.console.note(f"          the stacks could not be read: {escape(first_line(error))}")
            return None, []

    def _check_drain(self) -> None:
        """Makes the ranks save and stop if Ray drains one of the nodes: the run continues without it."""
        if self._drain_watch is None or self._drained is not None or self.phase not in ("training", "saving"):
            return
        for rank, node in enumerate(self.nodes.nodes):
            deadline = self._drain_watch.deadline_of(node.address)
            if deadline is not None:
                how = f"Ray drains it{time_left(deadline)}"
                self._drained = Failure(None, rank, time.time(), how, None, code=FailureCode.NODE_DRAINED)
                self.console.note(f"          node {rank} ({node.host}): {how}: saving a checkpoint")
                return

    def _show_progress(self) -> None:
        for line in self._evaluations.new():
            if isinstance(line.get("update"), int):
                self._hang_detector.evaluated(line["update"])
            self.console.evaluation(line)
        for line in self._metrics.new():
            if isinstance(line.get("update"), int):
                self._hang_detector.update(line["update"], line.get("step_seconds"))
                self.updates_made = line["update"] + 1
            self._show_update(line)

    def _show_update(self, line: dict[str, Any]) -> None:
        self.console.update(line)

    def _phase(self, report: PhaseReport) -> None:
        if report["phase"] == "loading":
            return
        self.phase = report["phase"]
        self._show_progress()
        self._hang_detector.enter(report["phase"], report["update"])
        try:
            self.enter(report["phase"], update=report["update"])
        except OSError as error:
            # The ranks write to the same disk: the first one that fails says more.
            if code_of(error) is not FailureCode.DISK_FULL:
                raise
            self.console.note(f"          state.json could not be written: {escape(first_line(error))}")

    def _record_event(self, report: EventReport) -> None:
        """Records an event of rank 0. Only this process writes events.jsonl: appends of several hosts may mix lines."""
        kind, details = report["event"], report["details"]
        self.run_dir.rank_event(report)
        if kind == "checkpoint":
            self._note_late_signal()
        if kind in _EVENT_TITLES:
            self.console.note(f"          {_EVENT_TITLES[kind]}: {details.get('reason', details)}")

    def _note_late_signal(self) -> None:
        """Warns once if Slurm's signal before the time limit leaves less time than the run needs to stop."""
        if self._noted_late_signal or "SLURM_JOB_ID" not in os.environ:
            return
        from launcher.slurm.stop_time import describe_late_signal, needed_signal_seconds, read_stop_time

        slurm, stop = self.plan.job.slurm, read_stop_time(self.run_dir)
        if stop is not None and (seconds := needed_signal_seconds(slurm, stop)) > slurm.signal_seconds:
            self._noted_late_signal = True
            text = f"{describe_late_signal(slurm, stop)}; set slurm.signal_seconds={seconds}"
            self.console.note(f"          [yellow]note:[/] {text}")

    def _disk_bytes(self) -> int:
        return disk_bytes(self.plan)

    def provide_data(self) -> None:
        """Makes sure that every node has the plan, the model and the data. Raises RunFailed."""
        data = self.plan.training.data
        prepared = [self.plan.training.model.folder, data.train.folder, *([data.eval.folder] if data.eval else [])]
        self.nodes.check_visible([str(self.plan_file)])
        self.nodes.tokenise_where_missing(self.plan, prepared)
        self.nodes.check_visible(prepared)
        self.nodes.exclude_blind_spares([str(self.plan_file), self.plan.training.model.folder])

    def _fail(self) -> None:
        """Waits for late events, ends all ranks and raises RunFailed, which names the rank that failed first."""
        self._collect_late_reports()
        self._show_progress()
        failures = self._diagnosis.of_reports(self.reports, self._hung)
        with printing_errors(self.console.note, "the ranks could not be ended"):
            self.nodes.end(GRACE_SECONDS)
        # The agents have counted the kernel's kills once more.
        raise self._failed([self._diagnosis.with_oom_kill(failure) for failure in failures])

    def _failed(self, failures: list[Failure]) -> RunFailed:
        """Records the failures of the attempt, and returns the error to raise."""
        self.failures = failures
        if failures[0].code is FailureCode.DISK_FULL:
            self.run_dir.release_reserve()
        with printing_errors(self.console.note, f"the failure could not be written to {self.run_dir.events_file}"):
            self._record_failures(failures)
        return RunFailed(self._diagnosis.message(failures), code=failures[0].code)

    def _record_failures(self, failures: Sequence[Failure]) -> None:
        first, nodes = failures[0], self.nodes.nodes
        self.run_dir.event(
            {
                "event": "failure",
                "attempt": self.attempt,
                "rank": first.rank,
                "node_rank": first.node_rank,
                "host": nodes[first.node_rank].host,
                "how": first.how,
                "exit_code": first.exit_code,
                "code": first.code,
                "error": first.error,
                "failures": [each.record(nodes[each.node_rank].host) for each in failures],
            }
        )

    def _collect_late_reports(self) -> None:
        """Receives late reports. Waits longer while all failures are of lost peers: a lost node is detected late."""
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            found = self._diagnosis.of_reports(self.reports, self._hung)
            only_lost_peers = all(lost_peer(failure) for failure in found)
            exits = sum(report["report"] == "exit" for report in self.reports)
            if waited >= (_LOST_NODE_SECONDS if only_lost_peers and exits < self.plan.world.size else _SETTLE_SECONDS):
                return
            self.reports += self.nodes.reports(_SETTLE_SECONDS / 2)

    def _task(self, node_rank: int, node: Node) -> NodeTask:
        world, folder, environment = self.plan.world, self._log_folder(node_rank, node), self._environment(node)
        return NodeTask(
            node_rank=node_rank,
            first_rank=node_rank * world.processes_per_node,
            processes=world.processes_per_node,
            world_size=world.size,
            run_dir=str(self.run_dir.path),
            log_folder=str(folder),
            environment={**flight_recorder(world, folder, environment, self.attempt), **environment},
            address=node.address,
            interface=node.interface,
            arguments=WORKER,
            attempt=self.attempt,
            output_mode=self.plan.job.output_mode,
            forked=self._forked,
        )

    def _environment(self, node: Node) -> dict[str, str]:
        return rank_environment(self.plan.world, node.interface, os.environ, self.plan.job.cluster.env)

    @property
    def _forked(self) -> bool:
        return begins_imports(self.plan.job)

    def _reserve_rendezvous(self, *, listen: bool) -> dict[str, str]:
        """The variables of the ranks' rendezvous, whose port the first node's agent holds until it starts them."""
        alone = self.plan.world.nodes == 1
        master = LOOPBACK if alone else self.nodes.nodes[0].address
        port = self.nodes.reserve_port(LOOPBACK if alone else "", listen=listen)
        return {"MASTER_ADDR": master, "MASTER_PORT": str(port)}

    def _log_folder(self, node_rank: int, node: Node) -> Path:
        return self.run_dir.node_logs(node_rank, node.host)


def _hang_detector(plan: Plan) -> HangDetector:
    train, total = plan.job.train, plan.length.total_updates
    if isinstance(plan.workload, Script):
        return HangDetector(train.hang_seconds, total, script=True)
    evaluates = plan.training.data.eval is not None
    return HangDetector(train.hang_seconds, total, evaluates=evaluates, eval_every=train.eval_every)
