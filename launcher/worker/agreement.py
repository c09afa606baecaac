"""Keeping all ranks on one plan: the same hash before training, the same rate during it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from launcher.errors import RunFailed
from launcher.plan.model import Plan
from launcher.plan.rate import planned_rates
from launcher.worker.ranks import Ranks


class OutOfStep(RunFailed):
    """A rank does not do what the plan says."""


def same_plan(ranks: Ranks, plan: Plan) -> None:
    """Raises OutOfStep on every rank, naming each whose plan is not that of the most."""
    found: list[tuple[str, str]] = ranks.gather((plan.sha256, ranks.host))
    agreed, _ = Counter(sha for sha, _ in found).most_common(1)[0]
    others = [f"rank {r} on {host} has {sha[:12]}…" for r, (sha, host) in enumerate(found) if sha != agreed]
    if others:
        raise OutOfStep(f"the plan differs between ranks: {'; '.join(others)}; the others have {agreed[:12]}…")


class InStep:
    """Holds every update against the plan, before it is made."""

    def __init__(self, ranks: Ranks, plan: Plan) -> None:
        self._ranks = ranks
        self._planned = planned_rates(plan)

    def check(self, engine: Any, update: int) -> float:
        """The rate of `update`, with which every parameter group is about to be stepped. Raises OutOfStep."""
        expected = self._planned(engine.global_steps - engine.skipped_steps)
        found = [float(group["lr"]) for group in engine.optimizer.param_groups]
        if engine.global_steps != update or any(rate != expected for rate in found):
            raise OutOfStep(
                f"rank {self._ranks.rank} on {self._ranks.host} would make update {update} "
                f"(its engine counts {engine.global_steps}) at a rate of {found[0]!r}; the plan says {expected!r}"
            )
        return expected
