"""Whether a job fits in memory: compares the memory estimate with the machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from launcher.ds_config.sizes import ZeroSizes, zero_sizes
from launcher.job import Job
from launcher.plan.checkpoint_copy import copy_bytes
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import PlanInputs
from launcher.plan.loss_memory import chunk_bytes, logits_bytes
from launcher.plan.memory import WIDTHS, MemoryEstimate, Work, estimate_memory, export_bytes, host_bytes
from launcher.plan.model_options import whole_logits_reason
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
        world = self.inputs.world
        work = replace(self._work(micro_batch), chunked_loss=self.chunked_loss(micro_batch))
        return estimate_memory(
            self.model, self._sizes, work, precision=self.inputs.precision, device=world.device, world_size=world.size
        )

    def _work(self, micro_batch: int) -> Work:
        section = self.inputs.job.model
        return Work(
            micro_batch=micro_batch,
            sequence_length=-(-self.longest // self.inputs.world.sequence_parallel_size),
            gradient_checkpointing=section.gradient_checkpointing,
            eager_attention=section.attn_implementation == "eager",
            fused_loss=section.liger,
            evaluated=self.inputs.job.data.eval is not None,
        )

    def chunked_loss(self, micro_batch: int) -> bool:
        """Whether the loss is computed for a chunk of tokens at a time."""
        setting = self.inputs.job.model.chunked_loss
        if not setting or whole_logits_reason(self.inputs, self.model) is not None:
            return False
        tokens, width = self._work(micro_batch).tokens, WIDTHS[self.inputs.precision]
        saves_memory = chunk_bytes(self.model, tokens, width) < logits_bytes(self.model, tokens)
        return setting is True or saves_memory

    def host_bytes(self, micro_batch: int) -> int:
        """The bytes of host memory that a node needs, with the copy of a checkpoint if the job asks for it."""
        job, world = self.inputs.job, self.inputs.world
        gathered = job.model.lora.merge if job.model.lora else self._sizes.stage == 3
        exported = export_bytes(self.model, self.inputs.precision) if job.export and gathered else 0
        needed = host_bytes(self.estimate(micro_batch), world.processes_per_node, world.device, exported)
        return needed + (self.copy_bytes or 0) if job.checkpoint.background is True else needed

    @property
    def copy_bytes(self) -> int | None:
        """The bytes of host memory that the copies of a checkpoint need on a node.

        None if no checkpoint can be written in the background: none is due before the end, or states are on NVMe.
        """
        if not self._saves_before_the_end or self._on_nvme:
            return None
        return copy_bytes(self.model, self._sizes, self.inputs.precision, self.inputs.world)

    def background_copy_bytes(self, micro_batch: int) -> int | None:
        """`copy_bytes` if checkpoints are written in the background, else None."""
        setting, copied = self.inputs.job.checkpoint.background, self.copy_bytes
        if setting != "auto" or copied is None:
            return copied if setting else None
        limits = memory_limits(self.inputs.world, self.inputs.machine)
        fits = limits.device is not None and self.host_bytes(micro_batch) + copied <= limits.host
        return copied if fits else None

    def background_warnings(self, micro_batch: int) -> list[str]:
        """Why training waits while a checkpoint is written, if the job does not ask for that."""
        setting, copied = self.inputs.job.checkpoint.background, self.copy_bytes
        if not setting or not self._saves_before_the_end or self.background_copy_bytes(micro_batch) is not None:
            return []
        if copied is None:
            return ["training waits while a checkpoint is written: DeepSpeed copies the states on NVMe itself"]
        reason = f"a copy of what is saved needs about {copied / GIB:.1f} GiB of host memory per node"
        return [
            f"training waits while a checkpoint is written: {reason}, and it is not known to be available; if it is, "
            f"set checkpoint.background: true"
        ]

    @property
    def _sizes(self) -> ZeroSizes:
        return zero_sizes(self.inputs.ds_config, self.model.hidden_size)

    @property
    def _saves_before_the_end(self) -> bool:
        section = self.inputs.job.checkpoint
        return section.every is not None or section.keep_every is not None

    @property
    def _on_nvme(self) -> bool:
        return "nvme" in astuple(self._sizes.offload)


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
