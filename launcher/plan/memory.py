"""Memory of one rank under ZeRO, estimated from the sizes of the model and of the DeepSpeed JSON.

Model states follow DeepSpeed's own accounting (arXiv 1910.02054, estimate_zero2_model_states_mem_needs): weights and
gradients in the working precision, and 12 bytes per trained parameter for float32 weights and two moments. Stage 1
divides the optimizer states by the world size, stage 2 also the gradients, stage 3 also the weights. The estimate adds
the largest of four phases of an update in DeepSpeed 0.19:

- forward and start of backward: activations (arXiv 2205.05198, without the attention matrix) and logits;
- just before, under ZeRO-3: activations and the buffer of prefetched weights;
- reducing: gradients are collected in a bucket, and the bucket is copied for the collective;
- the optimizer step: gradients as one flat float32 vector, and on a CPU two temporary vectors of PyTorch's Adam.

`benchmarks/memory.py` compares the estimate with measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launcher.ds_config.sizes import ZeroSizes
from launcher.plan.facts import ModelFacts
from launcher.plan.loss_memory import chunk_bytes, logits_bytes

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER, _ADAM_MOMENTS = 4, 8
_ADAM_VECTORS = 8
"""PyTorch's Adam without a fused kernel allocates two float32 vectors as large as the updated weights."""
_UNBUCKETED = 500_000_000
"""Without ZeRO, DeepSpeed reduces gradients in buckets of this many elements and ignores the JSON."""
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.3}
"""Unused memory that the allocator keeps, as a fraction of the memory in use. CUDA: assumed. glibc: the mean of the
100M models in benchmarks/memory.py; smaller models have more, since glibc does not return small tensors one by one."""
PROCESS_BYTES = 512 * 1024**2
"""Host memory of a rank's Python with torch, transformers and DeepSpeed loaded."""
PINNED = 1.5
"""Pinned buffers are rounded up to powers of two; DeepSpeed's own estimators use this factor."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank on its device, by content. On a CPU the device is the host.

    `buffers` are DeepSpeed's buckets and ZeRO-3's gathered weights; `update` is what prefetching, reducing or the
    optimizer step need beyond the memory of activations and logits; `base` is the process itself (on a CPU);
    `offloaded` is in host memory and `on_nvme` on NVMe, not on the device.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    buffers: int
    activations: int
    logits: int
    update: int
    fragmentation: int
    base: int
    offloaded: int
    on_nvme: int

    @property
    def device_total(self) -> int:
        parts = asdict(self)
        return sum(value for name, value in parts.items() if name not in ("offloaded", "on_nvme"))

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "device_total": self.device_total}


@dataclass(frozen=True)
class Work:
    """The micro-batch of a rank, and how the model processes it. `evaluated`: whether the run also evaluates."""

    micro_batch: int
    sequence_length: int
    gradient_checkpointing: bool = False
    eager_attention: bool = False
    fused_loss: bool = False
    evaluated: bool = False
    chunked_loss: bool = False

    @property
    def padded_length(self) -> int:
        """Batches are padded to a multiple of eight."""
        return -(-self.sequence_length // 8) * 8

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.padded_length


@dataclass(frozen=True)
class _Usage:
    """Bytes that a rank uses all the time, and additional bytes in each phase of an update."""

    parameters: int
    gradients: int
    optimizer_states: int
    buffers: int
    reducing: int
    updating: int
    fetching: int = 0
    """Together with the activations, before the logits exist."""
    offloaded: int = 0
    on_nvme: int = 0


@dataclass(frozen=True)
class _Sizes:
    """Elements, bytes and ranks from which the usage of every stage is computed."""

    zero: ZeroSizes
    total: int
    trained: int
    largest: int
    persistent: int
    width: int
    ranks: int
    cpu: bool

    @property
    def mixed(self) -> bool:
        return self.width < _MASTER

    @property
    def accumulated(self) -> int:
        """Bytes per element of the accumulated gradients."""
        return self.zero.accumulation_bytes or self.width

    @property
    def bucket(self) -> int:
        """Elements of gradients that fill the bucket."""
        return min(self.zero.reduce_bucket_size, self.trained)

    @property
    def allocated(self) -> int:
        """Elements of memory that the bucket uses: on a GPU all, on a CPU only those that are written."""
        return self.bucket if self.cpu else self.zero.reduce_bucket_size

    @property
    def overflowing(self) -> bool:
        """Whether the bucket fills up during the backward pass, while activations are still in memory."""
        return self.trained > self.zero.reduce_bucket_size

    def adam(self, elements: int) -> int:
        """Temporary bytes of the optimizer when it updates this many elements at once."""
        return _ADAM_VECTORS * elements if self.cpu else 0


def estimate_memory(
    model: ModelFacts, zero: ZeroSizes, work: Work, *, precision: str, device: str, world_size: int
) -> MemoryEstimate:
    """Bytes that one rank needs for micro-batches of `work`. Only trained parameters have gradients and states."""
    width = WIDTHS[precision]
    activations, logits = _forward(model, work, width)
    usage = _usage(_sizes_of(model, zero, width, world_size, cpu=device == "cpu"))
    forward = usage.gradients + activations + logits
    update = max(0, usage.reducing - forward, usage.updating - forward, usage.fetching - logits)
    in_use = usage.parameters + usage.optimizer_states + usage.buffers + forward + update
    if device == "cpu":
        in_use += usage.offloaded
    return MemoryEstimate(
        parameters=usage.parameters,
        gradients=usage.gradients,
        optimizer_states=usage.optimizer_states,
        buffers=usage.buffers,
        activations=activations,
        logits=logits,
        update=update,
        fragmentation=int(in_use * FRAGMENTATION[device]),
        base=PROCESS_BYTES if device == "cpu" else 0,
        offloaded=usage.offloaded,
        on_nvme=usage.on_nvme,
    )


def host_bytes(estimate: MemoryEstimate, processes: int, device: str, exported: int) -> int:
    """Host memory of a node with `processes` ranks; its first rank gathers `exported` bytes for the export."""
    if device == "cpu":
        return processes * (estimate.device_total + estimate.offloaded)
    return processes * (PROCESS_BYTES + estimate.offloaded) + exported


def export_bytes(model: ModelFacts, precision: str) -> int:
    """Host memory of the whole weights, which the first rank gathers or merges for the export."""
    return model.parameters * WIDTHS[precision]


def _forward(model: ModelFacts, work: Work, width: int) -> tuple[int, int]:
    """(bytes of activations, bytes of the logits and their loss): their sum is the peak of forward and backward.

    With checkpointing only one boundary per layer is kept; later, one layer at a time is recomputed without the logits.
    """
    tokens, hidden = work.tokens, model.hidden_size
    norms = 2 * (4 + 2 * width) * hidden
    attention = 4 * width * hidden + work.eager_attention * _matrix_bytes(model, work, width)
    layer = tokens * (norms + attention + 4 * width * model.intermediate_size)
    backward = tokens * 3 * width * model.intermediate_size
    if work.fused_loss:
        logits = 0
    else:
        logits = chunk_bytes(model, tokens, width) if work.chunked_loss else logits_bytes(model, tokens)
    if not work.gradient_checkpointing:
        activations = model.layers * layer + max(0, backward - logits)
    else:
        boundaries = model.layers * tokens * width * hidden
        activations = boundaries + max(0, layer + backward - logits)
    if work.fused_loss and work.evaluated:
        # Evaluation does not use the fused loss: it needs logits, a float32 copy and its softmax, but no activations.
        logits = max(0, tokens * model.vocab_size * (width + 8) - activations)
    return activations, logits


def _matrix_bytes(model: ModelFacts, work: Work, width: int) -> int:
    """Bytes of the attention matrix per token: in float32, and in the working precision if it is another."""
    return model.attention_heads * work.padded_length * (4 + (width if width < 4 else 0))


def _sizes_of(model: ModelFacts, zero: ZeroSizes, width: int, ranks: int, *, cpu: bool) -> _Sizes:
    trained = model.trainable_parameters
    return _Sizes(
        zero=zero,
        total=model.parameters + (trained if model.adapted_modules else 0),
        trained=trained,
        largest=min(trained, model.vocab_size * model.hidden_size),
        persistent=_persistent(model, zero.persistence_threshold),
        width=width,
        ranks=ranks,
        cpu=cpu,
    )


def _persistent(model: ModelFacts, threshold: int) -> int:
    """Elements of weights that ZeRO-3 does not partition because they are small, for the shapes of a Llama."""
    hidden, intermediate, layers = model.hidden_size, model.intermediate_size, model.layers
    shapes = ((hidden, 2 * layers + 1), (hidden * hidden, 4 * layers), (hidden * intermediate, 3 * layers))
    return min(model.parameters, sum(size * count for size, count in shapes if size <= threshold))


def _usage(sizes: _Sizes) -> _Usage:
    if sizes.zero.stage == 0:
        return _without_zero(sizes)
    return _stage3(sizes) if sizes.zero.stage == 3 else _stage1_and_2(sizes)


def _without_zero(sizes: _Sizes) -> _Usage:
    """Every rank has all model states."""
    gradients = sizes.width * sizes.trained
    master = _MASTER * sizes.trained if sizes.mixed else 0
    return _Usage(
        parameters=sizes.width * sizes.total,
        gradients=gradients,
        optimizer_states=_ADAM_MOMENTS * sizes.trained + master,
        buffers=0,
        reducing=gradients + sizes.width * min(sizes.trained, _UNBUCKETED),
        updating=gradients + master + sizes.adam(sizes.largest),
    )


def _stage1_and_2(sizes: _Sizes) -> _Usage:
    """Whole weights; divided optimizer states and, in stage 2, gradients."""
    part, width = sizes.trained // sizes.ranks, sizes.width
    copy = width * sizes.bucket
    bucket = width * sizes.allocated * (2 if sizes.zero.overlap_comm and (not sizes.cpu or sizes.overflowing) else 1)
    early = not sizes.cpu or sizes.overflowing
    # If stage 1 accumulates in another precision, it also keeps the gradients of the backward pass.
    accumulated = sizes.accumulated if sizes.accumulated != width else 0
    gradients = sizes.accumulated * part if sizes.zero.stage == 2 else (width + accumulated) * sizes.trained
    # In stage 1 the bucket replaces the gradients that are moved into it.
    filled = 0 if sizes.zero.stage == 1 and not early else bucket
    usage = _Usage(
        parameters=width * sizes.total,
        gradients=gradients,
        optimizer_states=(_MASTER + _ADAM_MOMENTS) * part,
        buffers=bucket + (copy if sizes.overflowing else 0) if early else 0,
        reducing=gradients + copy + (0 if early else filled),
        updating=sizes.accumulated * part + _MASTER * part + sizes.adam(part),
    )
    return usage if sizes.zero.offload.optimizer == "none" else _offloaded(sizes, usage, part)


def _offloaded(sizes: _Sizes, usage: _Usage, part: int) -> _Usage:
    """Stages 1 and 2 with the optimizer in host memory: states, float32 gradients, and two transfer buffers."""
    width = sizes.width
    pinned = (2 * sizes.zero.master_bytes + 2 * width) * part
    host = sizes.zero.moments_bytes * part + int(pinned * _pinning(sizes))
    return _Usage(
        parameters=usage.parameters,
        gradients=usage.gradients if sizes.zero.stage == 1 else 0,
        optimizer_states=0,
        buffers=usage.buffers + 2 * width * sizes.largest,
        reducing=usage.reducing,
        updating=sizes.adam(part),
        offloaded=host,
    )


def _stage3(sizes: _Sizes) -> _Usage:
    """All states divided; weights are gathered for use, and freed if they are not used again soon."""
    zero, width = sizes.zero, sizes.width
    part, weights = sizes.trained // sizes.ranks, width * (sizes.total // sizes.ranks + _second_copy(sizes))
    offloaded = zero.offload.optimizer != "none"
    copy = width * max(sizes.bucket, sizes.largest) * (2 if sizes.cpu else 1)
    group = min(part, zero.sub_group_size)
    host, on_nvme = _stage3_host(sizes, part, weights)
    return _Usage(
        parameters=(weights if zero.offload.parameters == "none" else 0) + width * sizes.persistent,
        gradients=0 if offloaded else sizes.accumulated * part,
        optimizer_states=0 if offloaded else (_MASTER + _ADAM_MOMENTS) * part,
        buffers=width * (sizes.allocated + _gathered(sizes)) + (copy if sizes.overflowing else 0),
        reducing=(0 if offloaded else sizes.accumulated * part) + copy - width * _gathered(sizes),
        updating=sizes.adam(group)
        + (0 if offloaded else (width + _MASTER * sizes.mixed) * group + sizes.accumulated * part)
        - width * _gathered(sizes),
        fetching=width * _prefetched(sizes),
        offloaded=host,
        on_nvme=on_nvme,
    )


def _second_copy(sizes: _Sizes) -> int:
    """Elements of ZeRO++'s second copy of the weights, in the same memory as the first, divided in groups of ranks.

    DeepSpeed limits a group to the world size.
    """
    group = sizes.zero.hpz_partition_size
    return sizes.total // min(group, sizes.ranks) if group > 1 else 0


def _gathered(sizes: _Sizes) -> int:
    """Elements that ZeRO-3 has gathered at the end of the forward pass.

    A weight stays gathered if its use in the backward pass is within the reuse distance, which counts the elements of
    both passes. Only weights that did not stay are prefetched.
    """
    return min(sizes.total, sizes.zero.max_reuse_distance // 2 + sizes.largest + _prefetched(sizes))


def _prefetched(sizes: _Sizes) -> int:
    """Elements that ZeRO-3 prefetches at once into one buffer, which exists until its last weight is used; each
    weight is a copy."""
    zero = sizes.zero
    live = max(0, zero.max_live_parameters - zero.max_reuse_distance // 2)
    return min(sizes.total, zero.prefetch_bucket_size, live)


def _stage3_host(sizes: _Sizes, part: int, weights: int) -> tuple[int, int]:
    """(host memory, bytes on NVMe) of a rank's offloaded states and weights."""
    zero, factor = sizes.zero, _pinning(sizes)
    host = on_nvme = 0.0
    states = (_MASTER + _ADAM_MOMENTS) * part
    if zero.offload.optimizer == "cpu":
        host += zero.moments_bytes * part + factor * (2 * zero.master_bytes + sizes.width) * part
    elif zero.offload.optimizer == "nvme":
        on_nvme += states + _MASTER * part
        group = min(part, zero.sub_group_size)
        host += factor * (sizes.width * part + zero.nvme_optimizer_buffers * _MASTER * group)
    if zero.offload.parameters == "cpu":
        host += factor * weights
    elif zero.offload.parameters == "nvme":
        on_nvme += weights
        host += factor * sizes.width * zero.nvme_parameter_elements
    return int(host), int(on_nvme)


def _pinning(sizes: _Sizes) -> float:
    return PINNED if sizes.zero.pinned and not sizes.cpu else 1.0
