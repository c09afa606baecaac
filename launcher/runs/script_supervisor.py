"""The supervisor of a user's script, which receives no orders and may report nothing."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.fleet.agent import NodeTask
from launcher.fleet.environment import rank_environment
from launcher.fleet.failures import first_failure
from launcher.fleet.nodes import Node, Nodes
from launcher.fleet.run_script import STOP_GRACE_SECONDS
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.plan.script import fill_arguments, fill_placeholders
from launcher.run_dir import RunDir
from launcher.runs.outcome import Outcome
from launcher.runs.supervisor import Console, Supervisor

RUN_SCRIPT = ("-P", "-m", "launcher.fleet.run_script")
"""-P: a launcher.py in the script's folder must not be imported instead of this package."""
_LR_TOLERANCE = 1e-6
"""Relative: scripts may report learning rates in single precision."""


class ScriptSupervisor(Supervisor):
    """Starts a script on every rank, passes settings in environment variables, and waits until all ranks have ended."""

    stop_action = f"sending SIGTERM to the script, which has {STOP_GRACE_SECONDS} s to end"

    def __init__(
        self, plan: Plan, script: Script, plan_file: Path, run: RunDir, console: Console, nodes: Nodes
    ) -> None:
        super().__init__(plan, plan_file, run, console, nodes)
        self.script = script
        self.updates: int | None = None
        self._rendezvous: dict[str, str] = {}
        self._planned_lr, self._lr_mismatch_reported = planned_lrs(plan), False

    def start(self, start: Start | None) -> None:
        del start
        self.prepare_nodes()
        self._rendezvous = self._reserve_rendezvous(listen=False)
        self.nodes.start([self._task(rank, node) for rank, node in enumerate(self.nodes.nodes)])
        self.phase = "training"
        self.enter("training", update=0)

    def request_stop(self, signal_number: int) -> bool:
        """As for other runs. Each rank kills a script that does not end in time, so the check for hangs ends here."""
        accepted = super().request_stop(signal_number)
        if accepted:
            self._hang_detector.switch_off()
        return accepted

    def _check_drain(self) -> None:
        """Does nothing: only the script knows whether it can save, and how it resumes."""

    def follow(self) -> Outcome:
        """Receives reports until the last rank has ended. After a stop request, any exit status counts as stopped."""
        ended: set[int] = set()
        for report in self._received():
            if report["report"] == "exit":
                ended.add(report["rank"])
            if first_failure([report]) and not (self.stopping and report["report"] == "exit"):
                self._fail()
            if len(ended) == self.plan.world.size:
                break
        self._show_progress()
        return Outcome("stopped" if self.stopping else "finished", self.updates)

    def _show_update(self, line: dict[str, Any]) -> None:
        super()._show_update(line)
        self.updates = max(self.updates or 0, line["update"] + 1)
        if not self._lr_mismatch_reported and isinstance(line.get("lr"), float | int):
            with contextlib.suppress(OverflowError):
                self._check_lr(line["update"], float(line["lr"]))

    def _check_lr(self, update: int, lr: float) -> None:
        """Reports once if a learning rate differs from the plan, as a note: scripts may have their own schedule."""
        planned, following = self._planned_lr(update), self._planned_lr(update + 1)
        if math.isclose(lr, planned, rel_tol=_LR_TOLERANCE):
            return
        self._lr_mismatch_reported = True
        reason = f"update {update} used {lr:.6g}, the plan has {planned:.6g}"
        if math.isclose(lr, following, rel_tol=_LR_TOLERANCE):
            reason += "; that belongs to the next update: report the learning rate before scheduler.step()"
        self.run_dir.event({"event": "other_rate", "update": update, "lr": lr, "planned_lr": planned, "reason": reason})
        self.console.note(f"          learning rate differs from the plan: {reason}")

    def _disk_bytes(self) -> int:
        return 0

    def provide_data(self) -> None:
        """Checks that every node sees the plan and the script. Modules are looked up by Python. Raises RunFailed."""
        script = self.script
        first = script.arguments[0]
        file = [] if first == "-m" else [str(Path(script.folder) / first)]
        needed = [str(self.plan_file), script.folder, *file]
        self.nodes.check_visible(needed)
        self.nodes.exclude_blind_spares(needed)

    def _task(self, node_rank: int, node: Node) -> NodeTask:
        arguments = fill_arguments(self.plan, self.script, self._paths())
        folder = self.script.folder
        return replace(super()._task(node_rank, node), arguments=(*RUN_SCRIPT, folder, *arguments))

    def _paths(self) -> dict[str, str]:
        return {"ds_config": str(self.run_dir.ds_config_file), "run_dir": str(self.run_dir.path)}

    def _environment(self, node: Node) -> dict[str, str]:
        job_env = {name: fill_placeholders(value, self._paths()) for name, value in self.plan.job.cluster.env.items()}
        settings = rank_environment(self.plan.world, node.interface, os.environ, job_env, script=True)
        if "HF_HUB_OFFLINE" not in {**os.environ, **job_env}:
            # The script's models and data were not downloaded beforehand.
            del settings["HF_HUB_OFFLINE"]
        return {
            **settings,
            **self._rendezvous,
            "LAUNCHER_DS_CONFIG": str(self.run_dir.ds_config_file),
            "LAUNCHER_TRAIN_BATCH_SIZE": str(self.plan.train_batch_size),
            # How often the script was started in this run directory before: above 0, it resumes by itself.
            "LAUNCHER_RESTART_COUNT": str(self.attempt - 1),
        }
