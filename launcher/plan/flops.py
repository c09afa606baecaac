"""The floating-point operations (FLOPs) of an update, and what GPUs can do at most. Pure."""

from __future__ import annotations

from launcher.plan.facts import ModelFacts

_TENSOR_TFLOPS: dict[str, float] = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "T4": 65,
    "MI300X": 1307,
    "MI250X": 191.5,
}
"""TFLOP/s in bfloat16 (V100 and T4: float16) without sparsity, from the vendors' data sheets; MI250X: of one of its two
devices. The first name whose words are all in the name of a device counts."""


def update_flops(model: ModelFacts, tokens: int, pairs: int) -> float | None:
    """The FLOPs of an update on `tokens` tokens; None if those of the model are unknown.

    `pairs` is the sum of the squared lengths of its sequences. A backward pass takes as many as a forward pass for the
    gradients of activations, and as many for those of weights, if they are trained. What gradient checkpointing repeats
    does not count, nor padding.
    """
    if not model.flops_per_token:
        return None
    trained = min(1.0, model.trainable_parameters / model.parameters)
    return model.flops_per_token * tokens * (2 + trained) + 3 * model.flops_per_pair * pairs


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The most TFLOP/s of a GPU in "bf16" or "fp16"; None in float32, and for an unknown device."""
    if precision == "fp32":
        return None
    words = device_name.upper().replace("-", " ").split()
    return next((peak for name, peak in _TENSOR_TFLOPS.items() if set(name.split()) <= set(words)), None)
