"""Checks that all ranks follow one plan: the same hash before training, the same learning rate during it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.schema import Plan
from launcher.worker.ranks import Ranks

_COLUMNS = 3
"""Values per rank in the table: its update, its learning rate, its skipped updates."""


class OutOfSyncError(RunFailed):
    """A rank does not follow the plan."""

    code = FailureCode.OUT_OF_STEP


def check_same_plan(ranks: Ranks, plan: Plan) -> list[str]:
    """Returns the host of every rank. Raises OutOfSyncError on every rank if a plan or DeepSpeed version differs.

    The reference is the hash that the supervisor sent with the order to start (without a supervisor, the most common
    hash), and the DeepSpeed version of the plan, whose schedulers define its curve.
    """
    found: list[tuple[str, str, str]] = ranks.gather((plan.sha256, version("deepspeed"), ranks.host))
    hosts = [host for _, _, host in found]
    expected = os.environ.get("LAUNCHER_PLAN_SHA256") or Counter(sha for sha, _, _ in found).most_common(1)[0][0]
    others = [f"rank {r} on {hosts[r]} has {sha[:12]}…" for r, (sha, _, _) in enumerate(found) if sha != expected]
    if others:
        message = f"the plan differs between ranks: {'; '.join(others)}; the run's plan is {expected[:12]}…"
        raise OutOfSyncError(message, code=FailureCode.PLAN_DIFFERS)
    version_of_plan = plan.machine.versions["deepspeed"]
    others = [
        f"rank {r} on {hosts[r]} has {theirs}" for r, (_, theirs, _) in enumerate(found) if theirs != version_of_plan
    ]
    if others:
        message = f"the plan was made with DeepSpeed {version_of_plan}: {'; '.join(others)}"
        raise OutOfSyncError(message, code=FailureCode.VERSIONS_DIFFER)
    return hosts


class LRCheck:
    """Compares every update with the plan, and the ranks with each other, before the update is made."""

    def __init__(self, ranks: Ranks, plan: Plan, hosts: Sequence[str]) -> None:
        self._ranks, self._hosts = ranks, hosts
        self._every = plan.job.schedule.check_every
        self._planned = planned_lrs(plan)

    def follow(self, plan: Plan) -> None:
        """Continues with a revision of the plan."""
        self._planned = planned_lrs(plan)

    def check(self, engine: Any, update: int) -> float:
        """Returns the learning rate of `update`, which every parameter group must have.

        Raises OutOfSyncError, naming the groups with another learning rate.
        """
        expected = self._planned(engine.global_steps - engine.skipped_steps)
        found = _learning_rates(engine)
        if engine.global_steps != update or any(rate != expected for rate in found):
            raise OutOfSyncError(
                f"rank {self._ranks.rank} on {self._ranks.host} would make update {update} "
                f"(its engine counts {engine.global_steps}) with {_differing(found, expected)}; "
                f"the plan says {expected!r}"
            )
        return expected

    def table_row(self, engine: Any, update: int) -> list[float]:
        """What this rank adds to the reduction of the loss if a comparison is due: zeros, and its own three values.

        The sum over the ranks is a table of all ranks, [world size · 3]. Empty if no comparison is due.
        """
        if update % self._every:
            return []
        table = [0.0] * (_COLUMNS * self._ranks.world_size)
        start = _COLUMNS * self._ranks.rank
        table[start : start + _COLUMNS] = [
            float(engine.global_steps),
            _learning_rates(engine)[0],
            float(engine.skipped_steps),
        ]
        return table

    def compare(self, table: Sequence[float], update: int) -> None:
        """Raises OutOfSyncError on every rank if the rows differ, naming the ranks with an uncommon row."""
        rows = [tuple(table[i : i + _COLUMNS]) for i in range(0, len(table), _COLUMNS)]
        if not rows:
            return
        common, _ = Counter(rows).most_common(1)[0]
        others = [
            f"rank {rank} on {self._hosts[rank]} is at update {row[0]:.0f} with a learning rate of {row[1]!r} "
            f"and {row[2]:.0f} skipped updates"
            for rank, row in enumerate(rows)
            if row != common
        ]
        if others:
            raise OutOfSyncError(
                f"before update {update} the ranks differ: {'; '.join(others)}; the others are at update "
                f"{common[0]:.0f} with {common[1]!r} and {common[2]:.0f}"
            )


def _differing(rates: Sequence[float], expected: float) -> str:
    """The learning rates that differ from `expected`, with their groups if there are several; else the first one."""
    others = {index: rate for index, rate in enumerate(rates) if rate != expected}
    if not others or len(rates) == 1:
        return f"a learning rate of {rates[0]!r}"
    each = " and ".join(f"{rate!r} in parameter group {index}" for index, rate in others.items())
    return f"a learning rate of {each} of {len(rates)}"


def _learning_rates(engine: Any) -> list[float]:
    return [float(group["lr"]) for group in engine.optimizer.param_groups]
