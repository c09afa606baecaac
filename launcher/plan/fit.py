"""Whether what a rank needs is there: the memory estimate against the machine."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.ds_config.sizes import zero_sizes
from launcher.job import Job
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import PlanInputs
from launcher.plan.memory import MemoryEstimate, Work, estimate_memory, export_bytes, host_bytes
from launcher.plan.schema import World

_USABLE = 0.9
"""The share of a memory that a plan counts on: the rest is for the system, CUDA's context and NCCL."""
GIB = 1024**3


@dataclass(frozen=True)
class Needs:
    """What decides about the memory of a job's ranks, but for the micro-batch. `longest` is in tokens."""

    inputs: PlanInputs[Job]
    model: ModelFacts
    longest: int

    def estimate(self, micro_batch: int) -> MemoryEstimate:
        """The bytes of one rank."""
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
        """The bytes of a node's host memory."""
        job, world = self.inputs.job, self.inputs.world
        stage = zero_sizes(self.inputs.ds_config, self.model.hidden_size).stage
        gathered = job.model.lora.merge if job.model.lora else stage == 3
        exported = export_bytes(self.model, self.inputs.precision) if job.export and gathered else 0
        return host_bytes(self.estimate(micro_batch), world.processes_per_node, world.device, exported)


@dataclass(frozen=True)
class Room:
    """Bytes that a plan may use: of a rank's GPU (None where none is seen), and of a node's host memory.

    On CPUs the ranks share the host's, and `device` is the part of one.
    """

    device: int | None
    host: int

    def holds(self, needs: Needs, micro_batch: int) -> bool:
        """Whether what is needed fits. Where no GPU is seen, the smallest micro-batch alone is believed to."""
        if self.device is None:
            # This is a login node then: its host memory says nothing of a node's either.
            return micro_batch == 1
        on_device = needs.estimate(micro_batch).device_total
        return on_device <= self.device and needs.host_bytes(micro_batch) <= self.host


def room_of(world: World, machine: MachineFacts) -> Room:
    """What a node alike the `machine` can give to the ranks of `world`."""
    host = int(machine.memory_bytes * _USABLE)
    if world.device == "cpu":
        return Room(host // world.processes_per_node, host)
    return Room(int(machine.gpu_memory_bytes * _USABLE) if machine.gpu_memory_bytes else None, host)


def memory_warnings(needs: Needs, micro_batch: int) -> list[str]:
    """What is too little, with its numbers, and what to turn."""
    world, machine = needs.inputs.world, needs.inputs.machine
    room, estimate = room_of(world, machine), needs.estimate(micro_batch)
    told = []
    if room.device is None:
        told.append(
            "no GPU is seen from here: whether the model fits its memory is not checked, and a micro-batch that is "
            "left open is 1; set train.train_micro_batch_size_per_gpu where more fits"
        )
    elif world.device == "cuda" and estimate.device_total > room.device:
        told.append(_too_much("a rank needs", estimate.device_total, "a GPU", room.device))
    host = needs.host_bytes(micro_batch)
    if host > room.host and (world.device == "cpu" or machine.gpu_memory_bytes):
        told.append(_too_much("the ranks of a node need", host, "its host memory", room.host))
    return told


def _too_much(who: str, needed: int, where: str, room: int) -> str:
    return (
        f"{who} about {needed / GIB:.1f} GiB and {where} has {room / GIB:.1f} GiB to use: take a smaller "
        f"micro-batch, gradient checkpointing, a shorter data.max_length, a higher ZeRO stage or offload"
    )
