"""Whether a job fits in memory: compares the memory estimate with the machine."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.ds_config.sizes import zero_sizes
from launcher.job import Job
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import PlanInputs
from launcher.plan.memory import MemoryEstimate, Work, estimate_memory, export_bytes, host_bytes
from launcher.plan.schema import World

_USABLE = 0.9
"""The fraction of memory that a plan may use. The rest is for the system, the CUDA context and NCCL."""
GIB = 1024**3


@dataclass(frozen=True)
class MemoryNeeds:
    """What determines the memory of a job's ranks, except the micro-batch. `longest` is in tokens."""

    inputs: PlanInputs[Job]
    model: ModelFacts
    longest: int

    def estimate(self, micro_batch: int) -> MemoryEstimate:
        """The bytes that one rank needs."""
        section, world = self.inputs.job.model, self.inputs.world
        work = Work(
            micro_batch=micro_batch,
            sequence_length=-(-self.longest // world.sequence_parallel_size),
            gradient_checkpointing=section.gradient_checkpointing,
            eager_attention=section.attn_implementation == "eager",
            fused_loss=section.liger,
            evaluated=self.inputs.job.data.eval is not None,
        )
        sizes = zero_sizes(self.inputs.ds_config, self.model.hidden_size)
        return estimate_memory(
            self.model, sizes, work, precision=self.inputs.precision, device=world.device, world_size=world.size
        )

    def host_bytes(self, micro_batch: int) -> int:
        """The bytes of host memory that a node needs."""
        job, world = self.inputs.job, self.inputs.world
        stage = zero_sizes(self.inputs.ds_config, self.model.hidden_size).stage
        gathered = job.model.lora.merge if job.model.lora else stage == 3
        exported = export_bytes(self.model, self.inputs.precision) if job.export and gathered else 0
        return host_bytes(self.estimate(micro_batch), world.processes_per_node, world.device, exported)


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that a plan may use: `device` of a rank's GPU, None if no GPU is visible; `host` of a node's memory.

    On CPUs the ranks share the host memory, and `device` is one rank's part of it.
    """

    device: int | None
    host: int

    def allow(self, needs: MemoryNeeds, micro_batch: int) -> bool:
        """Whether a micro-batch fits. If no GPU is visible, only the smallest counts as fitting."""
        if self.device is None:
            # This may be a login node: its host memory is not that of a compute node either.
            return micro_batch == 1
        on_device = needs.estimate(micro_batch).device_total
        return on_device <= self.device and needs.host_bytes(micro_batch) <= self.host


def memory_limits(world: World, machine: MachineFacts) -> MemoryLimits:
    """The limits for the ranks of `world` on nodes like `machine`."""
    host = int(machine.memory_bytes * _USABLE)
    if world.device == "cpu":
        return MemoryLimits(host // world.processes_per_node, host)
    return MemoryLimits(int(machine.gpu_memory_bytes * _USABLE) if machine.gpu_memory_bytes else None, host)


def memory_warnings(needs: MemoryNeeds, micro_batch: int) -> list[str]:
    """Which memory is too small, with its numbers, and which settings to change."""
    world, machine = needs.inputs.world, needs.inputs.machine
    limits, estimate = memory_limits(world, machine), needs.estimate(micro_batch)
    warnings = []
    if limits.device is None:
        warnings.append(
            "no GPU is visible here: the plan does not check whether the model fits in its memory, and an unset "
            "micro-batch is 1; set train.train_micro_batch_size_per_gpu if more fits"
        )
    elif world.device == "cuda" and estimate.device_total > limits.device:
        warnings.append(_too_much("a rank needs", estimate.device_total, "a GPU", limits.device))
    host = needs.host_bytes(micro_batch)
    if host > limits.host and (world.device == "cpu" or machine.gpu_memory_bytes):
        warnings.append(_too_much("the ranks of a node need", host, "the node", limits.host, " of host memory"))
    return warnings


def _too_much(who: str, needed: int, where: str, limit: int, kind: str = "") -> str:
    return (
        f"{who} about {needed / GIB:.1f} GiB{kind}, but {where} has {limit / GIB:.1f} GiB available: use a smaller "
        f"micro-batch, gradient checkpointing, a shorter data.max_length, a higher ZeRO stage or offload"
    )
