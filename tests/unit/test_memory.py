"""Memory of a rank at points that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.ds_config import Offload
from launcher.plan.memory import MemoryEstimate, estimate_memory
from tests.unit.given import model_facts

PARAMETERS = 1_000_000
MODEL = model_facts(parameters=PARAMETERS, hidden_size=8, intermediate_size=16, layers=3, vocab_size=100)


def estimate(**changes: Any) -> MemoryEstimate:
    ordinary: dict[str, Any] = {
        "stage": 0,
        "offload": Offload(),
        "precision": "bf16",
        "world_size": 4,
        "micro_batch": 2,
        "sequence_length": 10,
        "gradient_checkpointing": False,
    }
    return estimate_memory(MODEL, **{**ordinary, **changes})


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "states"),
    [(0, 2.0, 2.0, 16.0), (1, 2.0, 2.0, 4.0), (2, 2.0, 0.5, 4.0), (3, 2.0 + 0.5, 0.5, 4.0)],
)
def test_bytes_a_parameter_in_mixed_precision(stage: int, parameters: float, gradients: float, states: float) -> None:
    """DeepSpeed's 2 + 2 + 16, divided by four ranks; stage 3 also holds what it has gathered."""
    found = estimate(stage=stage)
    assert found.parameters == parameters * PARAMETERS
    assert found.gradients == gradients * PARAMETERS
    assert found.optimizer_states == states * PARAMETERS


def test_bytes_a_parameter_in_float32() -> None:
    found = estimate(precision="fp32")
    assert (found.parameters, found.gradients, found.optimizer_states) == tuple(n * PARAMETERS for n in (4, 4, 8))


def test_the_largest_model_holds_a_billion_live_parameters() -> None:
    large = model_facts(parameters=70_000_000_000)
    options = {"offload": Offload(), "precision": "bf16", "micro_batch": 1, "sequence_length": 1}
    found = estimate_memory(large, stage=3, world_size=1000, gradient_checkpointing=False, **options)  # type: ignore[arg-type]
    assert found.parameters == 2 * 70_000_000 + 2 * 1_000_000_000


def test_activations_and_logits() -> None:
    found = estimate()
    layer = 20 * 2 * (10 * 8 + 4 * 16)
    assert found.activations == 3 * layer
    assert found.logits == 20 * 100 * (2 + 8)
    assert estimate(gradient_checkpointing=True).activations == layer + 3 * 20 * 2 * 8
    assert estimate(micro_batch=6).activations == 3 * found.activations
    assert estimate(sequence_length=30).logits == 3 * found.logits


def test_offload_moves_bytes_and_loses_none() -> None:
    here, there = estimate(stage=2), estimate(stage=2, offload=Offload(optimizer="cpu"))
    assert (there.gradients, there.optimizer_states) == (0, 0)
    assert there.offloaded == here.gradients + here.optimizer_states
    assert there.device_total + there.offloaded == here.device_total

    here, there = estimate(stage=3), estimate(stage=3, offload=Offload(optimizer="nvme", parameters="cpu"))
    assert there.parameters == 2 * PARAMETERS
    assert there.device_total + there.offloaded == here.device_total


def test_parameters_stay_below_stage_3() -> None:
    assert estimate(stage=2, offload=Offload(parameters="cpu")).parameters == 2 * PARAMETERS


def test_the_total_is_what_lies_on_the_device() -> None:
    found = estimate(stage=2, offload=Offload(optimizer="cpu")).to_dict()
    parts = ("parameters", "gradients", "optimizer_states", "activations", "logits")
    assert found["device_total"] == sum(found[name] for name in parts)
