"""What DeepSpeed takes in its JSON and the launcher's own training loop does not carry out: refused before a run."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.ds_config import DsConfig
from launcher.ds_config.facts import as_bool
from launcher.errors import Problem
from launcher.job import Job, explicit_keys

_ONE_SCHEDULE = "every parameter group follows the plan's one learning rate"


def unsupported_problems(job: Job, user: DsConfig) -> Iterator[Problem]:
    """A Problem for each key of the JSON with which a run would train something else, stop, or never resume."""
    yield from _group_rates(job, user)
    if as_bool(user.get("managed_gradient_accumulation")) is False:
        yield user.problem(
            "managed_gradient_accumulation",
            "DeepSpeed would make an optimizer step of every micro-batch: the training loop leaves accumulation to it",
            "take it out, or run a script that accumulates by itself with launcher exec",
        )
    if as_bool(user.get("zero_optimization.elastic_checkpoint")):
        yield user.problem(
            "zero_optimization.elastic_checkpoint",
            "DeepSpeed saves such checkpoints and fails to load them",
            "take it out: launcher resume continues on another number of ranks without it",
        )


def _group_rates(job: Job, user: DsConfig) -> Iterator[Problem]:
    for name in ("muon_lr", "adam_lr"):
        if user.get(f"optimizer.params.{name}") is not None:
            yield user.problem(
                f"optimizer.params.{name}",
                f"a learning rate of its own for a part of the parameters: {_ONE_SCHEDULE}",
                f"take {name} out; lr, or schedule.peak_lr in the job, is the peak of all parameters",
            )
    params = user.get("scheduler.params")
    if not isinstance(params, dict) or "schedule.shape" in explicit_keys(job):
        return
    for name, value in params.items():
        if isinstance(value, list) and any(each != value[0] for each in value):
            yield user.problem(
                f"scheduler.params.{name}",
                f"a value for each parameter group: {_ONE_SCHEDULE}",
                "write one number",
            )
