"""The supervisor of a script of the user's own, which hears no orders and need not report."""

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
from launcher.fleet.nodes import Node
from launcher.fleet.run_script import STOP_GRACE_SECONDS
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.plan.script import fill_arguments, fill_placeholders
from launcher.run_dir import RunDir
from launcher.runs.outcome import Outcome
from launcher.runs.supervisor import Console, Supervisor

LEASH = ("-P", "-m", "launcher.fleet.run_script")
"""Without the folder on the leash's own path: a launcher.py there is the script's to import."""
_SAME_RATE = 1e-6
"""Relative: a rate may have gone through single precision."""


class ScriptSupervisor(Supervisor):
    """Starts a script on every rank, with all that it needs in its environment, and follows it to its end."""

    stops_by = f"SIGTERM for the script, which has {STOP_GRACE_SECONDS} s to end"

    def __init__(self, plan: Plan, script: Script, plan_file: Path, run: RunDir, console: Console) -> None:
        super().__init__(plan, plan_file, run, console)
        self.script = script
        self.updates: int | None = None
        self._rendezvous: dict[str, str] = {}
        self._planned, self._other_rate_told = planned_lrs(plan), False

    def start(self, start: Start | None) -> None:
        del start
        self.enter("starting")
        self.check_nodes()
        self.provide_data()
        self._rendezvous = {"MASTER_ADDR": self._master(), "MASTER_PORT": str(self.nodes.free_port(0))}
        self.nodes.start([self._task(rank, node) for rank, node in enumerate(self.nodes.nodes)])
        self.phase = "training"
        self.enter("training", update=0)

    def follow(self) -> Outcome:
        """Hears the ranks until the last has ended. Once asked to stop, they may end as they like."""
        ended: set[int] = set()
        for report in self._heard():
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
        if not self._other_rate_told and isinstance(line.get("lr"), float | int):
            with contextlib.suppress(OverflowError):
                self._check_rate(line["update"], float(line["lr"]))

    def _check_rate(self, update: int, rate: float) -> None:
        """Tells once of a rate that is not the plan's: a script may well have a schedule of its own."""
        planned, following = self._planned(update), self._planned(update + 1)
        if math.isclose(rate, planned, rel_tol=_SAME_RATE):
            return
        self._other_rate_told = True
        reason = f"update {update} was made at a rate of {rate:.6g}, and the plan has {planned:.6g}"
        if math.isclose(rate, following, rel_tol=_SAME_RATE):
            reason += "; that is the next update's: read the rate before the scheduler is stepped"
        self.run_dir.event(
            {"event": "other_rate", "update": update, "lr": rate, "planned_lr": planned, "reason": reason}
        )
        self.console.note(f"          another rate: {reason}")

    def _disk_bytes(self) -> int:
        return 0

    def provide_data(self) -> None:
        """Sees that every node has the script. A module is looked for by Python, in the folder or among packages."""
        script = self.script
        first = script.arguments[0]
        file = [] if first == "-m" else [str(Path(script.folder) / first)]
        self.nodes.check_visible([str(self.plan_file), script.folder, *file])

    def _task(self, node_rank: int, node: Node) -> NodeTask:
        arguments = fill_arguments(self.plan, self.script, self._places())
        folder = self.script.folder
        return replace(super()._task(node_rank, node), arguments=(*LEASH, folder, *arguments))

    def _places(self) -> dict[str, str]:
        return {"ds_config": str(self.run_dir.ds_config_file), "run_dir": str(self.run_dir.path)}

    def _environment(self, node: Node) -> dict[str, str]:
        users = {name: fill_placeholders(value, self._places()) for name, value in self.plan.job.cluster.env.items()}
        settings = rank_environment(self.plan.world, node.interface, os.environ, users, script=True)
        if "HF_HUB_OFFLINE" not in {**os.environ, **users}:
            # What the script needs was not fetched beforehand.
            del settings["HF_HUB_OFFLINE"]
        return {
            **settings,
            **self._rendezvous,
            "LAUNCHER_DS_CONFIG": str(self.run_dir.ds_config_file),
            "LAUNCHER_TRAIN_BATCH_SIZE": str(self.plan.train_batch_size),
            # How often Slurm has queued the job again: a script goes on from its own checkpoint where it is not 0.
            "LAUNCHER_RESTART_COUNT": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }
