"""The FLOPs of an update, and the peaks of GPUs."""

from __future__ import annotations

import pytest

from launcher.plan.flops import peak_tflops, update_flops
from tests.unit.inputs import model_facts


def test_a_backward_pass_counts_twice_and_without_trained_weights_once() -> None:
    model = model_facts(parameters=1000, trainable_parameters=1000, flops_per_token=2000.0, flops_per_pair=10.0)
    assert update_flops(model, tokens=50, pairs=400) == 3 * 2000 * 50 + 3 * 10 * 400
    adapters = model.model_copy(update={"trainable_parameters": 10})
    assert update_flops(adapters, tokens=50, pairs=400) == pytest.approx(2.01 * 2000 * 50 + 3 * 10 * 400)


def test_unknown_flops_are_none() -> None:
    assert update_flops(model_facts(), tokens=50, pairs=400) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-32GB", 125),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA A1000", None),
        ("an unknown device", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_data_sheet(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bf16") == peak_tflops(name, "fp16") == peak
    assert peak_tflops(name, "fp32") is None
