"""Carries out a plan in one or more attempts: after a failure, the policy decides whether the ranks start again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.errors import FailureCode, RequestError, RunFailed, first_line
from launcher.export_folder import export_fault
from launcher.fleet.forks import ForkServer
from launcher.fleet.node_failures import failed_nodes
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import GRACE_SECONDS, Nodes
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.run_dir import RunDir, write_atomic
from launcher.runs.best_export import export_of_run, exports_best
from launcher.runs.checkpoints import newest_verified
from launcher.runs.console import RunConsole
from launcher.runs.excluded_nodes import count_failures
from launcher.runs.failure_record import printing_errors
from launcher.runs.interrupts import Interrupts
from launcher.runs.outcome import Outcome
from launcher.runs.rest import Rest, plan_on, rest_from, rest_on
from launcher.runs.restart_policy import DEFAULT_RESTARTS, Decision, FailedAttempt, decide
from launcher.runs.resume_steps import export_only, prepare_start, report_damage

if TYPE_CHECKING:
    from launcher.runs.supervisor import Supervisor


class Attempts:
    """The attempts of one launcher to carry out the plan of a run directory. `plan` is that of the last attempt."""

    def __init__(
        self,
        directory: RunDir,
        console: RunConsole,
        interrupts: Interrupts,
        offered: ForkServer | None = None,
        on_rewind: Callable[[int], None] = lambda _samples: None,
    ) -> None:
        """`offered` is a fork server on this machine that may fork the ranks.

        `on_rewind` is called before each restart, with the samples after which it continues.
        """
        self._on_rewind = on_rewind
        self._directory, self._console, self._interrupts, self._offered = directory, console, interrupts, offered
        self._failed: list[FailedAttempt] = []
        self._nodes: Nodes | None = None
        self._supervisor: Supervisor | None = None

    @property
    def stop_signal(self) -> int:
        """The number of the signal that stopped the last attempt; 0 if none did."""
        return self._supervisor.stop_signal if self._supervisor else 0

    def run(self, plan: Plan, plan_file: Path, start: Start | None) -> Outcome:
        """Carries out the plan to its end or a stop. Raises RunFailed for a failure without a further restart.

        Releases the nodes in every case, except if Ray is lost: every call would block until Ray ends this process.
        """
        self.plan, self._plan_file, self._start = plan, plan_file, start
        self._wanted_nodes = plan.world.nodes
        try:
            outcome = self._run_to_the_end()
        except BaseException as error:
            if not (isinstance(error, RunFailed) and error.code is FailureCode.RAY_LOST):
                self._release_after_failure()
            raise
        self._release(0.0 if outcome.state == "stopped" else GRACE_SECONDS)
        return outcome

    def _run_to_the_end(self) -> Outcome:
        while True:
            supervisor = self._supervisor = self._interrupts.supervisor = self._next_supervisor()
            before = self._newest_checkpoint()
            try:
                outcome = supervisor.run(self._start)
            except RunFailed as error:
                saved, excluded = self._newest_checkpoint() != before, self._exclude_failed_nodes(supervisor)
                self._failed.append(_failed_attempt(supervisor, error, saved=saved, excluded=excluded))
                if supervisor.stopping:
                    raise
                decision = decide(self._failed, self._allowed_restarts())
                if not decision.restart:
                    self._record_end(decision)
                    raise
                reason = first_line(error)
            else:
                return self._with_best_export(outcome)
            # Until the next attempt, a signal stops the run at once: nothing can be saved.
            self._interrupts.supervisor = None
            self._console.end_progress()
            self._console.note(f"[bold red]failed[/]    {escape(reason)}")
            self._console.note(f"[bold]restarting[/] ({escape(decision.reason)})")
            if (ended := self._prepare_restart()) is not None:
                return ended
            update = self._start.update if self._start else None
            attempt = supervisor.attempt + 1
            self._directory.event({"event": "restart", "attempt": attempt, "update": update, "reason": reason})
            if decision.pause_seconds:
                self._console.note(f"          waiting {decision.pause_seconds:.0f} s before the restart")
                time.sleep(decision.pause_seconds)

    def _next_supervisor(self) -> Supervisor:
        plan, arguments = self.plan, (self._plan_file, self._directory, self._console)
        self._console.total = plan.length.total_updates
        if self._nodes is None:
            request = NodeResources.of(plan.world, plan.job.cluster.spare_nodes)
            self._nodes = Nodes(request, self._console.note, self._offered)
            if plan.job.cluster.exclude_after:
                self._exclude(self._nodes, self._directory.excluded_nodes())
        if isinstance(plan.workload, Script):
            from launcher.runs.script_supervisor import ScriptSupervisor

            return ScriptSupervisor(plan, plan.workload, *arguments, self._nodes)
        from launcher.runs.supervisor import Supervisor

        return Supervisor(plan, *arguments, self._nodes)

    def _exclude(self, nodes: Nodes, excluded: Mapping[str, str]) -> None:
        for host, reason in excluded.items():
            nodes.exclude(host, reason)
            self._console.note(f"          {escape(f'not using {host} any more: {reason}')}")

    def _exclude_failed_nodes(self, supervisor: Supervisor) -> bool:
        """Counts the failures of nodes, and excludes those that failed too often.

        Returns whether the run can restart without an excluded node. A node without which it could not is still used.
        """
        nodes, cluster = supervisor.nodes, self.plan.job.cluster
        hosts = [node.host for node in nodes.nodes]
        least = cluster.min_nodes or self._wanted_nodes
        with printing_errors(self._console.note, "the failures of nodes could not be written"):
            for host, reason in count_failures(
                self._directory, failed_nodes(supervisor.failures, hosts), cluster.exclude_after
            ).items():
                if nodes.can_do_without(host, least):
                    self._exclude(nodes, {host: reason})
                else:
                    text = f"{host} {reason}; it is used until the run ends, since no other node is free"
                    self._console.note(f"          {escape(text)}")
        return any(host in nodes.excluded and nodes.can_do_without(host, least) for host in hosts)

    def _allowed_restarts(self) -> int:
        """The job's `train.restarts`, or its default: only a script knows how it resumes."""
        restarts = self.plan.job.train.restarts
        if restarts is None:
            return 0 if isinstance(self.plan.workload, Script) else DEFAULT_RESTARTS
        return restarts

    def _newest_checkpoint(self) -> int | None:
        return next(reversed(self._directory.complete_checkpoints()), None)

    def _record_end(self, decision: Decision) -> None:
        """Records why the run does not start again, if a restart was possible at all."""
        if self._allowed_restarts():
            with suppress(OSError):
                self._directory.event({"event": "no_restart", "reason": decision.reason})
            self._console.note(f"          not restarting: {escape(decision.reason)}")

    def _prepare_restart(self) -> Outcome | None:
        """Finds the checkpoint for the next attempt. Returns the outcome if all updates were made already."""
        last = self._failed[-1]
        if self._nodes is not None and (last.lost_hosts or last.code is FailureCode.RAY_LOST):
            self._nodes.restart_own_ray()
        if isinstance(self.plan.workload, Script):
            # Only the script knows at which update it resumes: `launcher.report` restores the lines before that update.
            self._directory.rewind(samples=0, update=-1)
            return None
        rest = self._newest_rest()
        if rest is not None and rest.only_export:
            return self._finish(rest)
        if (nodes := self._nodes_for_restart()) != self.plan.world.nodes:
            self._change_nodes(nodes, rest)
        if self._start is None:
            self._directory.rewind(samples=0, update=-1)
        else:
            prepare_start(self._start, self._directory, self._console)
        self._on_rewind(self._start.samples if self._start else 0)
        return None

    def _newest_rest(self) -> Rest | None:
        """Makes the next attempt start from the newest checkpoint that verifies; None if no checkpoint was saved."""
        try:
            saved, damaged = newest_verified(self._directory, lambda text: self._console.note(f"          {text}"))
        except RequestError:
            if self._start is not None:
                raise
            self._console.note("          no checkpoint was saved yet: starting from the first update")
            return None
        rest = rest_from(saved, damaged)
        if self._start is not None and str(saved.folder) == self._start.checkpoint:
            # The plan may be that of a resume, which changed the plan of this checkpoint.
            return replace(rest, plan=self.plan, plan_file=self._plan_file, start=self._start, early_stop=None)
        report_damage(rest, self._directory, self._console)
        self.plan, self._plan_file, self._start = saved.plan, saved.plan_file, rest.start
        self._console.note(f"          resuming after update {rest.start.update} of {self.plan.length.total_updates}")
        return rest

    def _nodes_for_restart(self) -> int:
        """On how many nodes to restart: as many as the job asks for, or those that are free, at least `min_nodes`."""
        assert self._nodes is not None
        cluster, wanted, present = self.plan.job.cluster, self._wanted_nodes, self.plan.world.nodes
        if cluster.min_nodes is None or wanted == 1:
            return present
        # A run that already continues on fewer nodes has waited before.
        wait_seconds = cluster.wait_seconds if present == wanted else 0.0
        ready = self._nodes.ready(wanted, cluster.min_nodes, wait_seconds)
        if ready < cluster.min_nodes:
            message = (
                f"after {wait_seconds:.0f} s only {ready} nodes are free, and cluster.min_nodes is {cluster.min_nodes}"
            )
            raise RunFailed(message, code=FailureCode.NOT_ENOUGH_NODES)
        return ready

    def _change_nodes(self, nodes: int, rest: Rest | None) -> None:
        """Plans the rest of the run for `nodes` nodes, or for fewer if the batch cannot be divided among them."""
        assert self._nodes is not None
        before, least = self.plan.world.nodes, self.plan.job.cluster.min_nodes or nodes
        reason: RequestError | None = None
        for count in range(nodes, least - 1, -1):
            try:
                if rest is None:
                    self.plan = plan_on(self.plan, count, self._console)
                else:
                    changed = rest_on(rest, count, self._console)
                    self.plan, self._start = changed.plan, changed.start
            except RequestError as error:
                reason = error
                continue
            self._plan_file = self._directory.next_plan_revision()
            write_atomic(self._plan_file, self.plan.to_json())
            self._nodes.resize(NodeResources.of(self.plan.world, self.plan.job.cluster.spare_nodes))
            self._console.note(
                f"          continuing on {count} nodes instead of {before}; the batch size stays the same"
            )
            return
        raise RunFailed(f"the run cannot continue on {nodes} nodes: {reason}", code=FailureCode.NOT_ENOUGH_NODES)

    def _finish(self, rest: Rest) -> Outcome:
        """All updates were made: makes the export if it is missing."""
        if rest.plan.job.export and export_fault(self._directory.export) is not None:
            return export_only(rest, self._directory, self._console, self._interrupts)
        return rest.outcome

    def _with_best_export(self, outcome: Outcome) -> Outcome:
        """Exports the best checkpoint of a finished run if the job asks for it: the ranks do not."""
        if outcome.state == "finished" and exports_best(self.plan):
            # A signal now ends the export at once; a resume makes it.
            self._interrupts.supervisor = None
            updates = outcome.updates or 0
            export_of_run(self.plan, None, updates, self._directory, self._console, self._interrupts)
        return outcome

    def _release(self, grace_seconds: float) -> None:
        if self._nodes is not None:
            try:
                self._nodes.end(grace_seconds)
            finally:
                self._nodes.close()

    def _release_after_failure(self) -> None:
        """Releases the nodes. Errors are only printed: the caller raises the original failure."""
        with printing_errors(self._console.note, "the nodes could not be released"):
            self._release(0.0 if self.stop_signal else GRACE_SECONDS)


def _failed_attempt(supervisor: Supervisor, error: RunFailed, *, saved: bool, excluded: bool) -> FailedAttempt:
    hosts = [node.host for node in supervisor.nodes.nodes]
    lost = {hosts[each.node_rank] for each in supervisor.failures if each.code is FailureCode.NODE_LOST}
    first = supervisor.failures[0] if supervisor.failures else None
    text = (first.error or first.how) if first else first_line(error)
    own_ray = supervisor.nodes.own_ray and bool(hosts)
    return FailedAttempt(
        error.code, supervisor.updates_made, saved, text, tuple(sorted(lost)), excluded=excluded, own_ray=own_ray
    )
