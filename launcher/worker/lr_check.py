"""Keeping all ranks on one plan: the same hash before training, the same rate during it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.plan.learning_rate import planned_rates
from launcher.plan.schema import Plan
from launcher.worker.ranks import Ranks

_WORDS = 3
"""What each rank tells of itself: its update, its rate, its skipped updates."""


class OutOfStep(RunFailed):
    """A rank does not do what the plan says."""

    code = FailureCode.OUT_OF_STEP


def same_plan(ranks: Ranks, plan: Plan) -> list[str]:
    """The host of every rank. Raises OutOfStep on every rank, naming each that has another plan or DeepSpeed.

    The plan that counts is the supervisor's, whose hash came with the order to go (that of the most ranks where there
    is no supervisor); the DeepSpeed is the plan's, whose schedulers its curve is.
    """
    found: list[tuple[str, str, str]] = ranks.gather((plan.sha256, version("deepspeed"), ranks.host))
    hosts = [host for _, _, host in found]
    agreed = os.environ.get("LAUNCHER_PLAN_SHA256") or Counter(sha for sha, _, _ in found).most_common(1)[0][0]
    others = [f"rank {r} on {hosts[r]} has {sha[:12]}…" for r, (sha, _, _) in enumerate(found) if sha != agreed]
    if others:
        message = f"the plan differs between ranks: {'; '.join(others)}; the run's is {agreed[:12]}…"
        raise OutOfStep(message, code=FailureCode.PLAN_DIFFERS)
    wanted = plan.machine.versions["deepspeed"]
    others = [f"rank {r} on {hosts[r]} has {theirs}" for r, (_, theirs, _) in enumerate(found) if theirs != wanted]
    if others:
        message = f"the plan was made with DeepSpeed {wanted}: {'; '.join(others)}"
        raise OutOfStep(message, code=FailureCode.VERSIONS_DIFFER)
    return hosts


class InStep:
    """Holds every update against the plan, and the ranks against each other, before the update is made."""

    def __init__(self, ranks: Ranks, plan: Plan, hosts: Sequence[str]) -> None:
        self._ranks, self._hosts = ranks, hosts
        self._every = plan.job.schedule.check_every
        self._planned = planned_rates(plan)

    def follow(self, plan: Plan) -> None:
        """Goes on under a revision of the plan."""
        self._planned = planned_rates(plan)

    def check(self, engine: Any, update: int) -> float:
        """The learning rate of `update`, with which every parameter group is about to be stepped.

        Raises OutOfStep, naming the groups with another one.
        """
        expected = self._planned(engine.global_steps - engine.skipped_steps)
        found = _rates(engine)
        if engine.global_steps != update or any(rate != expected for rate in found):
            raise OutOfStep(
                f"rank {self._ranks.rank} on {self._ranks.host} would make update {update} "
                f"(its engine counts {engine.global_steps}) at {_differing(found, expected)}; "
                f"the plan says {expected!r}"
            )
        return expected

    def words(self, engine: Any, update: int) -> list[float]:
        """What this rank adds to the loss's reduction where a comparison is due: zeros, and its own three numbers.

        Summed over the ranks that is a table of all ranks, [world size · 3]; at other updates it is empty.
        """
        if update % self._every:
            return []
        table = [0.0] * (_WORDS * self._ranks.world_size)
        start = _WORDS * self._ranks.rank
        table[start : start + _WORDS] = [float(engine.global_steps), _rates(engine)[0], float(engine.skipped_steps)]
        return table

    def compare(self, table: Sequence[float], update: int) -> None:
        """Raises OutOfStep on every rank, naming each that is not where the plan has the ranks at this update."""
        rows = [tuple(table[i : i + _WORDS]) for i in range(0, len(table), _WORDS)]
        if not rows:
            return
        agreed, _ = Counter(rows).most_common(1)[0]
        others = [
            f"rank {rank} on {self._hosts[rank]} is at update {row[0]:.0f} with a rate of {row[1]!r} "
            f"and {row[2]:.0f} skipped updates"
            for rank, row in enumerate(rows)
            if row != agreed
        ]
        if others:
            raise OutOfStep(
                f"before update {update} the ranks differ: {'; '.join(others)}; the others are at update "
                f"{agreed[0]:.0f} with {agreed[1]!r} and {agreed[2]:.0f}"
            )


def _differing(rates: Sequence[float], expected: float) -> str:
    """The learning rates that differ from `expected`, with their groups where there are several; else the first."""
    others = {index: rate for index, rate in enumerate(rates) if rate != expected}
    if not others or len(rates) == 1:
        return f"a learning rate of {rates[0]!r}"
    each = " and ".join(f"{rate!r} in parameter group {index}" for index, rate in others.items())
    return f"a learning rate of {each} of {len(rates)}"


def _rates(engine: Any) -> list[float]:
    return [float(group["lr"]) for group in engine.optimizer.param_groups]
