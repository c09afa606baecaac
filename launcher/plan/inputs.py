"""The inputs of a plan that need no measurement of model or data, and what follows from them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeGuard, TypeVar

from launcher.ds_config import DsConfig, batch_keys, precision_of
from launcher.ds_config.facts import Precision
from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, Job, ScriptJob, explicit_keys
from launcher.plan.batch import KEYS
from launcher.plan.facts import MachineFacts
from launcher.plan.schema import World

J = TypeVar("J", bound=AnyJob, covariant=True)
JobT = TypeVar("JobT", bound=AnyJob)
_PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class PlanInputs(Generic[J]):
    """A job, its DeepSpeed JSON as the user wrote it, and a node; all nodes are alike.

    `explicit` are the dotted names of the job's keys that the user set to a value other than auto and null. `world` and
    `precision` follow from the rest. `kept_micro_batch` is that of a resumed run: it stays if neither micro-batch nor
    accumulation is set and it divides the batch.
    """

    job: J
    ds_config: DsConfig
    machine: MachineFacts
    explicit: frozenset[str]
    world: World
    precision: Precision
    kept_micro_batch: int | None = None

    def with_ds_config(self, ds_config: DsConfig) -> PlanInputs[J]:
        """The same inputs with another DeepSpeed JSON."""
        precision = _precision(self.job, ds_config, self.world, self.machine)
        return replace(self, ds_config=ds_config, precision=precision)

    @property
    def given_batch_without_tokens(self) -> dict[str, int]:
        """The batch sizes that the JSON or the job sets, without the one that follows from tokens_per_batch."""
        in_job = {key: getattr(self.job.train, key) for key in KEYS if getattr(self.job.train, key) != "auto"}
        return {**batch_keys(self.ds_config), **in_job}

    @property
    def bins_per_step(self) -> int:
        """Bins that all ranks together process in one forward pass, or in one update if the accumulation is set."""
        given = self.given_batch_without_tokens
        return self.world.data_parallel_size * given.get(KEYS[1], 1) * given.get(KEYS[2], 1)

    @property
    def given_batch(self) -> dict[str, int]:
        """The batch sizes that the JSON or the job sets, by DeepSpeed's names. The job has precedence."""
        given = self.given_batch_without_tokens
        batch, micro, accumulation = KEYS
        tokens = self.job.train.tokens_per_batch
        if tokens is not None and isinstance(self.job, Job) and self.job.data.packing:
            given[batch] = tokens // self.job.data.max_length // self.bins_per_step * self.bins_per_step
        kept = self.kept_micro_batch
        if kept is not None and given.keys() & {micro, accumulation} == set() and batch in given:
            divides = given[batch] % (kept * self.world.data_parallel_size) == 0
            return {**given, micro: kept} if divides else given
        return given


def plan_inputs(
    job: JobT, ds_config: DsConfig, machine: MachineFacts, *, kept_micro_batch: int | None = None
) -> PlanInputs[JobT]:
    """The inputs, with the world and the precision derived. Raises RequestError if the job's ranks are inconsistent."""
    world = resolve_world(job, machine)
    return PlanInputs(
        job=job,
        ds_config=ds_config,
        machine=machine,
        explicit=explicit_keys(job),
        world=world,
        precision=_precision(job, ds_config, world, machine),
        kept_micro_batch=kept_micro_batch,
    )


def resolve_world(job: AnyJob, machine: MachineFacts) -> World:
    """Ranks and their device. The job's gpus_per_node is not checked here: this may be a login node."""
    cluster = job.cluster
    gpus = machine.gpus if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    requested = cluster.processes_per_node
    if gpus and cluster.gpus_per_node != "auto" and requested not in ("auto", gpus):
        raise RequestError(
            Problem(
                f"{requested} processes and {gpus} GPUs per node, but each GPU has one rank",
                key="cluster.processes_per_node",
                hint="remove it: it is for CPUs",
            )
        )
    processes = gpus or (1 if requested == "auto" else requested)
    shared = job.model.sequence_parallel_size if job.model else 1
    if cluster.nodes * processes % shared:
        raise RequestError(
            Problem(
                f"{cluster.nodes * processes} ranks cannot be divided into groups of {shared}",
                key="model.sequence_parallel_size",
                hint="use a divisor of the number of ranks",
            )
        )
    return World(
        nodes=cluster.nodes,
        processes_per_node=processes,
        device="cuda" if gpus else "cpu",
        backend="nccl" if gpus else "gloo",
        threads_per_process=min(max(1, machine.cpus // processes), 8 if gpus else machine.cpus),
        sequence_parallel_size=shared,
    )


def _precision(job: AnyJob, ds_config: DsConfig, world: World, machine: MachineFacts) -> Precision:
    """The job's precision, else the JSON's, else the best that the hardware supports."""
    if job.model is not None and job.model.dtype != "auto":
        return _PRECISIONS[job.model.dtype]
    fixed = precision_of(ds_config)
    if fixed is not None:
        return fixed
    if world.device == "cpu":
        return "fp32"
    return "bf16" if machine.bf16 or not machine.gpus else "fp16"


def is_training(inputs: PlanInputs[AnyJob]) -> TypeGuard[PlanInputs[Job]]:
    """Whether the launcher itself trains."""
    return isinstance(inputs.job, Job)


def is_script(inputs: PlanInputs[AnyJob]) -> TypeGuard[PlanInputs[ScriptJob]]:
    """Whether the job runs a script."""
    return isinstance(inputs.job, ScriptJob)
