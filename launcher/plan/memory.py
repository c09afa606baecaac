"""Memory of one rank under ZeRO, estimated from the sizes of a model.

States follow DeepSpeed's own estimators (estimate_zero2_model_states_mem_needs): mixed precision with Adam holds 2
bytes of weights, 2 of gradients and 16 of float32 weights, moments and gradients a parameter, float32 holds 4, 4 and 8.
Stage 1 divides the optimizer states by the world size, stage 2 the gradients too, stage 3 the weights too (arXiv
1910.02054).
Activations follow Korthikanti et al. (arXiv 2205.05198) with the attention matrix never written out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launcher.ds_config import Offload
from launcher.plan.facts import ModelFacts

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_OPTIMIZER_BYTES = {"fp32": 8, "bf16": 16, "fp16": 16}
_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what ZeRO-3 may hold gathered at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank on its device, by what they hold; `offloaded` lies in host memory or on NVMe instead."""

    parameters: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    offloaded: int

    @property
    def device_total(self) -> int:
        return self.parameters + self.gradients + self.optimizer_states + self.activations + self.logits

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "device_total": self.device_total}


def estimate_memory(
    model: ModelFacts,
    *,
    stage: int,
    offload: Offload,
    precision: str,
    world_size: int,
    micro_batch: int,
    sequence_length: int,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Bytes that one rank needs for a micro-batch of `micro_batch` sequences of `sequence_length` tokens."""
    width, count = _BYTES[precision], model.parameters
    parameters = count * width // (world_size if stage == 3 else 1)
    gradients = count * width // (world_size if stage >= 2 else 1)
    states = count * _OPTIMIZER_BYTES[precision] // (world_size if stage >= 1 else 1)
    live = min(count, _LIVE_PARAMETERS) * width if stage == 3 else 0
    offloaded = 0
    if offload.optimizer != "none":
        offloaded, gradients, states = offloaded + states + gradients, 0, 0
    if stage == 3 and offload.parameters != "none":
        offloaded, parameters = offloaded + parameters, 0
    tokens = micro_batch * sequence_length
    return MemoryEstimate(
        parameters=parameters + live,
        gradients=gradients,
        optimizer_states=states,
        activations=_activations(model, tokens, width, gradient_checkpointing),
        logits=tokens * model.vocab_size * (width + 8),
        offloaded=offloaded,
    )


def _activations(model: ModelFacts, tokens: int, width: int, checkpointing: bool) -> int:
    """What the backward pass needs kept: every layer's inputs, or one layer's and a boundary a layer."""
    layer = tokens * width * (10 * model.hidden_size + 4 * model.intermediate_size)
    if checkpointing:
        return layer + model.layers * tokens * width * model.hidden_size
    return model.layers * layer
