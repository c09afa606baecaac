"""Memory of one rank under ZeRO, estimated from the sizes of a model and of the DeepSpeed JSON.

What is held all the time follows DeepSpeed's own accounting (arXiv 1910.02054, estimate_zero2_model_states_mem_needs):
weights and gradients in the working precision, and 12 bytes a trained parameter of float32 weights and two moments;
stage 1 divides the optimizer states by the world size, stage 2 the gradients too, stage 3 the weights too. On top comes
the largest of four moments of an update, as DeepSpeed 0.19 goes through them:

- forward and the begin of backward: activations (arXiv 2205.05198, the attention matrix never written out) and logits;
- just before, under ZeRO-3: activations, and the buffer in which weights were fetched ahead;
- reducing: gradients are gathered in a bucket, and the bucket is copied once more for the collective;
- the update: gradients as one flat float32 vector, and on a CPU two more vectors that PyTorch's Adam makes on the way.

`benchmarks/memory.py` holds all this against what ranks take.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launcher.ds_config.sizes import ZeroSizes
from launcher.plan.facts import ModelFacts

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER, _MOMENTS = 4, 8
_ADAM_VECTORS = 8
"""PyTorch's Adam without a fused kernel makes two float32 vectors of the size of what it updates."""
_UNBUCKETED = 500_000_000
"""Without ZeRO DeepSpeed reduces gradients in buckets of so many elements, whatever the JSON says."""
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.3}
"""What an allocator holds beyond what is in use, as a share of it. CUDA: assumed. glibc: the mean of the 100M models
of benchmarks/memory.py; it is more for smaller ones, whose tensors are too small to be given back one by one."""
PROCESS_BYTES = 512 * 1024**2
"""Host memory of a rank's Python with torch, transformers and DeepSpeed loaded."""
_PINNED = 1.5
"""Page-locked buffers are rounded up to powers of two; the factor is that of DeepSpeed's own estimators."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank on its device, by what they hold. On a CPU the device is the host.

    `buffers` are DeepSpeed's buckets and ZeRO-3's gathered weights, `update` what fetching, reducing or updating needs
    beyond the room of activations and logits, `base` the process itself (on a CPU), `offloaded` what rests in host
    memory instead, and `on_nvme` what rests there.
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
    """What a rank puts through the model at once: sequences of so many tokens, and how."""

    micro_batch: int
    sequence_length: int
    gradient_checkpointing: bool = False
    eager_attention: bool = False
    fused_loss: bool = False
    evaluated: bool = False
    """Whether the run evaluates besides, in micro-batches of the same size."""

    @property
    def padded_length(self) -> int:
        """Batches are padded to a multiple of eight."""
        return -(-self.sequence_length // 8) * 8

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.padded_length


@dataclass(frozen=True)
class _Moments:
    """Bytes that a rank holds all the time, and besides at each moment of an update."""

    parameters: int
    gradients: int
    optimizer_states: int
    buffers: int
    reducing: int
    updating: int
    fetching: int = 0
    """Beside the activations, before there are logits."""
    offloaded: int = 0
    on_nvme: int = 0


@dataclass(frozen=True)
class _Sizes:
    """The numbers that all stages reckon with: parameters, bytes, ranks."""

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
        """Bytes of a gradient as it is accumulated and kept for the update."""
        return self.zero.accumulation_bytes or self.width

    @property
    def bucket(self) -> int:
        """Elements of the bucket that gradients fill."""
        return min(self.zero.reduce_bucket_size, self.trained)

    @property
    def allocated(self) -> int:
        """Elements that the bucket takes: a GPU's memory in full, a CPU's as far as it is written to."""
        return self.bucket if self.cpu else self.zero.reduce_bucket_size

    @property
    def overflowing(self) -> bool:
        """Whether the bucket is emptied on the way backward, while activations are still held."""
        return self.trained > self.zero.reduce_bucket_size

    def adam(self, elements: int) -> int:
        """Bytes that the optimizer makes on the way, updating so many elements at once."""
        return _ADAM_VECTORS * elements if self.cpu else 0


def estimate_memory(
    model: ModelFacts, zero: ZeroSizes, work: Work, *, precision: str, device: str, world_size: int
) -> MemoryEstimate:
    """Bytes that one rank needs for micro-batches of `work`. Frozen weights count as such; adapters as trained."""
    width = _BYTES[precision]
    activations, logits = _forward(model, work, width)
    moments = _moments(_sizes_of(model, zero, width, world_size, cpu=device == "cpu"))
    forward = moments.gradients + activations + logits
    update = max(0, moments.reducing - forward, moments.updating - forward, moments.fetching - logits)
    held = moments.parameters + moments.optimizer_states + moments.buffers + forward + update
    if device == "cpu":
        held += moments.offloaded
    return MemoryEstimate(
        parameters=moments.parameters,
        gradients=moments.gradients,
        optimizer_states=moments.optimizer_states,
        buffers=moments.buffers,
        activations=activations,
        logits=logits,
        update=update,
        fragmentation=int(held * FRAGMENTATION[device]),
        base=PROCESS_BYTES if device == "cpu" else 0,
        offloaded=moments.offloaded,
        on_nvme=moments.on_nvme,
    )


def host_bytes(estimate: MemoryEstimate, processes: int, device: str, exported: int) -> int:
    """Host memory of a node with so many ranks; `exported` bytes are gathered on the first for the export."""
    if device == "cpu":
        return processes * (estimate.device_total + estimate.offloaded)
    return processes * (PROCESS_BYTES + estimate.offloaded) + exported


def export_bytes(model: ModelFacts, precision: str) -> int:
    """Host memory that whole weights take on the first rank, where they are gathered or merged for the export."""
    return model.parameters * _BYTES[precision]


def _forward(model: ModelFacts, work: Work, width: int) -> tuple[int, int]:
    """(bytes that the forward pass keeps, bytes for the logits and their loss), of which the sum is the largest moment.

    With checkpointing only a boundary a layer is kept, and later one layer is computed again without the logits.
    """
    tokens, hidden = work.tokens, model.hidden_size
    norms = 2 * (4 + 2 * width) * hidden
    attention = 4 * width * hidden + work.eager_attention * _matrix_bytes(model, work, width)
    layer = tokens * (norms + attention + 4 * width * model.intermediate_size)
    walking = tokens * 3 * width * model.intermediate_size
    logits = 0 if work.fused_loss else tokens * model.vocab_size * 12
    if not work.gradient_checkpointing:
        activations = model.layers * layer + max(0, walking - logits)
    else:
        boundaries = model.layers * tokens * width * hidden
        activations = boundaries + max(0, layer + walking - logits)
    if work.fused_loss and work.evaluated:
        # The fused loss is for training. Evaluation makes the logits, and their softmax from a float32 copy, at a
        # moment when no activations are kept.
        logits = max(0, tokens * model.vocab_size * (width + 8) - activations)
    return activations, logits


def _matrix_bytes(model: ModelFacts, work: Work, width: int) -> int:
    """Attention weights that are written out, a token: in float32, and in the working precision where that differs."""
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
    """Elements of the weights that ZeRO-3 never parts, being small: by a Llama's shapes."""
    hidden, wide, layers = model.hidden_size, model.intermediate_size, model.layers
    shapes = ((hidden, 2 * layers + 1), (hidden * hidden, 4 * layers), (hidden * wide, 3 * layers))
    return min(model.parameters, sum(size * count for size, count in shapes if size <= threshold))


def _moments(sizes: _Sizes) -> _Moments:
    if sizes.zero.stage == 0:
        return _whole(sizes)
    return _stage3(sizes) if sizes.zero.stage == 3 else _stage1_and_2(sizes)


def _whole(sizes: _Sizes) -> _Moments:
    """Without ZeRO: every rank holds everything."""
    gradients = sizes.width * sizes.trained
    master = _MASTER * sizes.trained if sizes.mixed else 0
    return _Moments(
        parameters=sizes.width * sizes.total,
        gradients=gradients,
        optimizer_states=_MOMENTS * sizes.trained + master,
        buffers=0,
        reducing=gradients + sizes.width * min(sizes.trained, _UNBUCKETED),
        updating=gradients + master + sizes.adam(sizes.largest),
    )


def _stage1_and_2(sizes: _Sizes) -> _Moments:
    """Weights whole; states divided, and under stage 2 the gradients."""
    part, width = sizes.trained // sizes.ranks, sizes.width
    copy = width * sizes.bucket
    bucket = width * sizes.allocated * (2 if sizes.zero.overlap_comm and (not sizes.cpu or sizes.overflowing) else 1)
    early = not sizes.cpu or sizes.overflowing
    # Stage 1 accumulates another precision beside the gradients of the backward pass, which it keeps.
    besides = sizes.accumulated if sizes.accumulated != width else 0
    gradients = sizes.accumulated * part if sizes.zero.stage == 2 else (width + besides) * sizes.trained
    # In stage 1 the bucket takes the place of the gradients that are moved into it.
    filled = 0 if sizes.zero.stage == 1 and not early else bucket
    moments = _Moments(
        parameters=width * sizes.total,
        gradients=gradients,
        optimizer_states=(_MASTER + _MOMENTS) * part,
        buffers=bucket + (copy if sizes.overflowing else 0) if early else 0,
        reducing=gradients + copy + (0 if early else filled),
        updating=sizes.accumulated * part + _MASTER * part + sizes.adam(part),
    )
    return moments if sizes.zero.offload.optimizer == "none" else _offloaded(sizes, moments, part)


def _offloaded(sizes: _Sizes, moments: _Moments, part: int) -> _Moments:
    """Stages 1 and 2 with the optimizer in host memory: states, float32 gradients, and two vectors as go-betweens."""
    width = sizes.width
    pinned = (2 * sizes.zero.master_bytes + 2 * width) * part
    host = sizes.zero.moments_bytes * part + int(pinned * _pinning(sizes))
    return _Moments(
        parameters=moments.parameters,
        gradients=moments.gradients if sizes.zero.stage == 1 else 0,
        optimizer_states=0,
        buffers=moments.buffers + 2 * width * sizes.largest,
        reducing=moments.reducing,
        updating=sizes.adam(part),
        offloaded=host,
    )


def _stage3(sizes: _Sizes) -> _Moments:
    """Everything divided; weights are gathered for use, and freed where they are not used again soon."""
    zero, width = sizes.zero, sizes.width
    part, weights = sizes.trained // sizes.ranks, width * (sizes.total // sizes.ranks + _second_copy(sizes))
    away = zero.offload.optimizer != "none"
    copy = width * max(sizes.bucket, sizes.largest) * (2 if sizes.cpu else 1)
    group = min(part, zero.sub_group_size)
    host, on_nvme = _stage3_host(sizes, part, weights)
    return _Moments(
        parameters=(weights if zero.offload.parameters == "none" else 0) + width * sizes.persistent,
        gradients=0 if away else sizes.accumulated * part,
        optimizer_states=0 if away else (_MASTER + _MOMENTS) * part,
        buffers=width * (sizes.allocated + _gathered(sizes)) + (copy if sizes.overflowing else 0),
        reducing=(0 if away else sizes.accumulated * part) + copy - width * _gathered(sizes),
        updating=sizes.adam(group)
        + (0 if away else (width + _MASTER * sizes.mixed) * group + sizes.accumulated * part)
        - width * _gathered(sizes),
        fetching=width * _ahead(sizes),
        offloaded=host,
        on_nvme=on_nvme,
    )


def _second_copy(sizes: _Sizes) -> int:
    """Elements of ZeRO++'s second copy of the weights, which is where the first is, divided in groups of ranks.

    DeepSpeed cuts a group that is larger than the world to all ranks.
    """
    group = sizes.zero.hpz_partition_size
    return sizes.total // min(group, sizes.ranks) if group > 1 else 0


def _gathered(sizes: _Sizes) -> int:
    """Elements that ZeRO-3 holds gathered when forward turns into backward.

    A weight of the forward pass stays where its use in the backward pass is nearer than the reuse distance, which
    counts the way there and back. Ahead of that only what did not stay is fetched.
    """
    return min(sizes.total, sizes.zero.max_reuse_distance // 2 + sizes.largest + _ahead(sizes))


def _ahead(sizes: _Sizes) -> int:
    """Elements that ZeRO-3 fetches ahead, at once: into one buffer, which lasts until its last weight is used, while
    each weight is a copy."""
    zero = sizes.zero
    live = max(0, zero.max_live_parameters - zero.max_reuse_distance // 2)
    return min(sizes.total, zero.prefetch_bucket_size, live)


def _stage3_host(sizes: _Sizes, part: int, weights: int) -> tuple[int, int]:
    """(host memory, bytes on NVMe) of a rank's offloaded states and weights."""
    zero, factor = sizes.zero, _pinning(sizes)
    host = on_nvme = 0.0
    states = (_MASTER + _MOMENTS) * part
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
    return _PINNED if sizes.zero.pinned and not sizes.cpu else 1.0
