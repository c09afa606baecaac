"""Whether a checkpoint must be converted for another number of ranks, and whether DeepSpeed's converter can do it."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.ds_config.facts import as_bool
from launcher.ds_config.optimizer_class import ADAM_TYPES
from launcher.errors import Problem, RequestError
from launcher.job.schema import ClusterSection
from launcher.plan.schema import Plan

_SHARDS = ("whole", "by optimizer states", "by optimizer states", "by parameters")
"""How each ZeRO stage divides the saved state."""


def must_convert(old: Plan, saved_ranks: int, ranks: int) -> bool:
    """Whether a checkpoint that `old` saved on `saved_ranks` ranks must be converted to be loaded by `ranks`.

    Without ZeRO every rank saves the whole state, which any number of ranks can load. Raises RequestError if the
    conversion would fail or lose a part of the state.
    """
    if saved_ranks == ranks or old.zero_stage == 0:
        return False
    problems = list(_not_convertible(old, saved_ranks, ranks))
    if problems:
        raise RequestError(*problems)
    return True


def check_same_kind_of_state(old: Plan, new: Plan) -> None:
    """Raises RequestError if `new` has optimizer states of another kind than the checkpoints of `old`."""
    before, after = (plan.ds_config["optimizer"]["type"] for plan in (old, new))
    kinds = {"adam" if kind.lower() in ADAM_TYPES else kind.lower() for kind in (before, after)}
    if len(kinds) > 1:
        found = f"the checkpoint has the optimizer states of {before}, but the resumed run uses {after}"
        hint = f"resume with {before}, or start a new run from an exported model"
        raise RequestError(Problem(found, key="deepspeed", hint=hint))
    # Conversion for another number of ranks keeps this division, so it does not help.
    if _SHARDS[old.zero_stage] != _SHARDS[new.zero_stage]:
        found = f"the checkpoint was saved with ZeRO-{old.zero_stage}, and ZeRO-{new.zero_stage} cannot load it"
        hint = f"resume with ZeRO-{old.zero_stage}, or start a new run from an exported model"
        raise RequestError(Problem(found, key="deepspeed", hint=hint))


def expected_ranks(old: Plan, cluster: ClusterSection) -> int | None:
    """The number of ranks of a resume of `old` on `cluster`; None if it depends on the nodes."""
    before, gpus, processes = old.job.cluster, cluster.gpus_per_node, cluster.processes_per_node
    if (gpus, processes) == (before.gpus_per_node, before.processes_per_node):
        return cluster.nodes * old.world.processes_per_node
    each = gpus or processes
    return None if each == "auto" else cluster.nodes * each


def _not_convertible(old: Plan, saved_ranks: int, ranks: int) -> Iterator[Problem]:
    """Why DeepSpeed's converter cannot convert this plan's checkpoints.

    It keeps only the weights and Adam's two moments (checkpoint/ds_to_universal.py of 0.19.8).
    """
    config = old.ds_config
    kind, params = config["optimizer"]["type"], config["optimizer"].get("params", {})
    zero = config.get("zero_optimization") or {}
    if kind.lower() not in ADAM_TYPES:
        yield _problem(f"the optimizer is {kind}, not Adam or AdamW", saved_ranks, ranks)
    elif as_bool(params.get("amsgrad")):
        yield _problem(f"{kind} uses amsgrad, whose maximum moments would be lost", saved_ranks, ranks)
    if zero.get("zenflow"):
        yield _problem("ZenFlow is on, and its states would be lost", saved_ranks, ranks)
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        yield _problem("the optimizer states are on the nodes' NVMe disks", saved_ranks, ranks)


def _problem(found: str, saved_ranks: int, ranks: int) -> Problem:
    return Problem(
        f"the checkpoint was saved on {saved_ranks} ranks and cannot be converted for {ranks}: {found}",
        key="cluster",
        hint=f"resume on {saved_ranks} ranks, or start a new run from an exported model",
    )
