"""Memory of a rank, compared with numbers worked out by hand and with measurements."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest

from launcher.ds_config import Offload, from_mapping
from launcher.ds_config.sizes import ZeroSizes, zero_sizes
from launcher.errors import RequestError
from launcher.plan.fit import MemoryNeeds
from launcher.plan.inputs import plan_inputs
from launcher.plan.memory import FRAGMENTATION, PROCESS_BYTES, MemoryEstimate, Work, estimate_memory, host_bytes
from launcher.plan.model_options import check_chunked_loss
from tests.unit.inputs import job_of, machine_facts, model_facts

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "memory.py"
MILLION = 1_000_000
MODEL = model_facts(parameters=MILLION, hidden_size=8, intermediate_size=16, layers=3, vocab_size=100)
WORK = Work(micro_batch=2, sequence_length=10)
TOKENS = 2 * 16
SMALL = {"reduce_bucket_size": 1000, "prefetch_bucket_size": 0, "max_reuse_distance": 0, "persistence_threshold": 0}
LARGEST = 800
"""Elements of the embeddings of MODEL."""


def estimate(stage: int = 0, work: Work = WORK, model: Any = MODEL, **changes: Any) -> MemoryEstimate:
    """By default on four GPUs in bfloat16."""
    machine = {"precision": "bf16", "device": "cuda", "world_size": 4}
    machine |= {name: changes.pop(name) for name in machine.keys() & changes.keys()}
    return estimate_memory(model, ZeroSizes(stage=stage, **{**SMALL, **changes}), work, **machine)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "states"),
    [(0, 2.0, 2.0, 12.0), (1, 2.0, 2.0, 3.0), (2, 2.0, 0.5, 3.0), (3, 0.5, 0.5, 3.0)],
)
def test_bytes_per_parameter_in_mixed_precision(stage: int, parameters: float, gradients: float, states: float) -> None:
    """2 + 2 + 12, divided by four ranks stage by stage."""
    found = estimate(stage)
    assert found.parameters == parameters * MILLION
    assert found.gradients == gradients * MILLION
    assert found.optimizer_states == states * MILLION


def test_bytes_per_parameter_in_float32() -> None:
    """ZeRO keeps a float32 copy of float32 weights too."""
    whole, split = estimate(precision="fp32"), estimate(2, precision="fp32")
    assert (whole.parameters, whole.gradients, whole.optimizer_states) == (4 * MILLION, 4 * MILLION, 8 * MILLION)
    assert (split.parameters, split.gradients, split.optimizer_states) == (4 * MILLION, MILLION, 3 * MILLION)


@pytest.mark.parametrize(("stage", "gradients"), [(1, 6.0), (2, 1.0), (3, 1.0)])
def test_gradients_accumulated_in_float32(stage: int, gradients: float) -> None:
    """4 bytes in addition to stage 1's 2; 4 bytes instead of 2, divided by four ranks, in stages 2 and 3."""
    found = estimate(stage, accumulation_bytes=4)
    assert found.gradients == gradients * MILLION
    assert (found.parameters, found.optimizer_states) == (
        estimate(stage).parameters,
        estimate(stage).optimizer_states,
    )
    user = from_mapping({"data_types": {"grad_accum_dtype": "float32"}}, "ds.json")
    assert zero_sizes(user, 100).accumulation_bytes == 4


@pytest.mark.parametrize(("stage", "transfer_buffers"), [(1, 2), (2, 2), (3, 1)])
def test_master_weights_and_moments_in_bfloat16_halve_the_offloaded_states(stage: int, transfer_buffers: int) -> None:
    """4 + 4 bytes of master weights and gradients, and 8 of moments."""
    offload = {"offload": Offload(optimizer="cpu"), "pinned": False}
    assert estimate(stage, **offload).offloaded == (8 + 4 + 4 + 2 * transfer_buffers) * MILLION // 4
    assert estimate(stage, master_bytes=2, **offload).offloaded == (8 + 2 + 2 + 2 * transfer_buffers) * MILLION // 4
    assert (
        estimate(stage, master_bytes=2, moments_bytes=4, **offload).offloaded
        == (8 + 2 * transfer_buffers) * MILLION // 4
    )
    switches = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    sizes = zero_sizes(from_mapping({"bf16": switches}, "ds.json"), 100)
    assert (sizes.master_bytes, sizes.moments_bytes) == (2, 4)
    sizes = zero_sizes(from_mapping({"bf16": {**switches, "enabled": False}}, "ds.json"), 100)
    assert (sizes.master_bytes, sizes.moments_bytes) == (4, 8)


@pytest.mark.parametrize(("group", "shared_by"), [(2, 2), (4, 4), (8, 4), (100, 4)])
def test_the_second_copy_is_divided_by_at_most_the_world_size(group: int, shared_by: int) -> None:
    assert estimate(3, hpz_partition_size=group).parameters - estimate(3).parameters == 2 * MILLION // shared_by


def test_frozen_weights_have_neither_gradients_nor_optimizer_states() -> None:
    frozen = estimate(1, model=MODEL.model_copy(update={"trainable_parameters": 1000}))
    assert (frozen.parameters, frozen.gradients, frozen.optimizer_states) == (2 * MILLION, 2000, 12 * 250)
    adapted = MODEL.model_copy(update={"trainable_parameters": 1000, "adapted_modules": ("q_proj",)})
    assert estimate(1, model=adapted).parameters == 2 * (MILLION + 1000)


def test_activations_and_logits() -> None:
    """Norms keep a float32 copy, a 16-bit copy and its product; attention four vectors, the MLP four of its width."""
    found = estimate()
    layer = TOKENS * (2 * (4 + 2 * 2) * 8 + 4 * 2 * 8 + 4 * 2 * 16)
    assert (found.activations, found.logits) == (3 * layer, TOKENS * 100 * 12)
    assert estimate(work=Work(6, 10)).activations == 3 * found.activations
    assert estimate(work=Work(2, 16)).logits == found.logits
    assert estimate(work=Work(2, 17)).logits == found.logits * 24 // 16
    assert estimate(work=Work(2, 10, fused_loss=True)).logits == 0
    # Evaluation needs logits but no activations: bfloat16, a float32 copy and its softmax.
    evaluated = estimate(work=Work(2, 10, fused_loss=True, evaluated=True))
    fused = estimate(work=Work(2, 10, fused_loss=True))
    assert evaluated.logits == max(0, TOKENS * 100 * 10 - fused.activations)
    wide = estimate(model=MODEL.model_copy(update={"vocab_size": 5000}), work=Work(2, 10, True, False, True, True))
    assert wide.activations + wide.logits == TOKENS * 5000 * 10
    assert estimate(work=Work(2, 10, evaluated=True)) == found
    eager = estimate(work=Work(2, 10, eager_attention=True))
    assert eager.activations == found.activations + 3 * TOKENS * 32 * 16 * (4 + 2)


def test_checkpointing_keeps_layer_boundaries_and_the_logits_or_one_layer() -> None:
    found = estimate(work=Work(2, 10, gradient_checkpointing=True))
    assert found.activations == 3 * TOKENS * 2 * 8
    narrow = MODEL.model_copy(update={"vocab_size": 1})
    one_layer = TOKENS * (2 * 8 * 8 + 4 * 2 * 8 + 4 * 2 * 16 + 3 * 2 * 16)
    found = estimate(work=Work(2, 10, gradient_checkpointing=True), model=narrow)
    assert found.activations + found.logits == 3 * TOKENS * 2 * 8 + one_layer


def test_buckets_use_memory_in_full_on_a_gpu_and_as_written_on_a_cpu() -> None:
    sizes = {"reduce_bucket_size": 5 * MILLION}
    assert estimate(2, **sizes).buffers == 2 * 5 * MILLION
    assert estimate(2, overlap_comm=True, **sizes).buffers == 2 * 2 * 5 * MILLION
    on_cpu = estimate(2, device="cpu", **sizes)
    assert on_cpu.buffers == 0
    reducing = 2 * (MILLION + MILLION)
    assert on_cpu.update == reducing - on_cpu.activations - on_cpu.logits
    overflowing = estimate(2, reduce_bucket_size=1000)
    assert overflowing.buffers == 2 * (1000 + 1000)


def test_weights_that_zero_3_keeps_gathered_follow_the_json() -> None:
    def buffers(**sizes: int) -> int:
        return estimate(3, **sizes).buffers - estimate(3).buffers

    assert buffers(max_reuse_distance=200_000) == 2 * 100_000
    assert buffers(max_reuse_distance=10**9) == 2 * (MILLION - LARGEST)
    assert buffers(prefetch_bucket_size=50_000) == 2 * 50_000
    assert buffers(prefetch_bucket_size=50_000, max_live_parameters=20_000) == 2 * 20_000
    # Weights that stayed are not fetched again.
    assert buffers(prefetch_bucket_size=50_000, max_reuse_distance=10**9, max_live_parameters=2 * 10**9) == (
        2 * (MILLION - LARGEST)
    )
    vectors = 2 * (2 * 3 + 1) * 8
    assert estimate(3, persistence_threshold=8).parameters - estimate(3).parameters == vectors
    assert estimate(3, persistence_threshold=64).parameters - estimate(3).parameters == vectors + 2 * 12 * 64


def test_prefetched_weights_of_zero_3_exist_twice_before_the_logits() -> None:
    """The first copy is the prefetch buffer, which is freed before the logits are computed."""

    def update(vocab_size: int, prefetched: int) -> int:
        sizes = {"reduce_bucket_size": 2 * MILLION, "prefetch_bucket_size": prefetched, "max_reuse_distance": 0}
        model = MODEL.model_copy(update={"vocab_size": vocab_size, "trainable_parameters": 1000})
        found = estimate(3, model=model, **sizes)
        return found.update + found.logits

    assert update(1, 500_000) == 2 * 500_000
    assert update(1, 600_000) == 2 * 600_000
    assert update(10_000, 500_000) == update(10_000, 0) == TOKENS * 10_000 * 12


def test_zero_plus_plus_has_a_second_copy_of_the_weights() -> None:
    """Divided by groups of two of the four ranks, and in host memory if the first copy is there."""
    plain, doubled = estimate(3), estimate(3, hpz_partition_size=2)
    assert doubled.parameters - plain.parameters == 2 * MILLION // 2
    assert estimate(2, hpz_partition_size=2) == estimate(2)
    offload = {"offload": Offload("cpu", "cpu"), "pinned": False}
    moved = estimate(3, hpz_partition_size=2, **offload)
    assert moved.parameters == 0
    assert moved.offloaded - estimate(3, **offload).offloaded == 2 * MILLION // 2
    block = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    assert zero_sizes(from_mapping(block, "ds.json"), 100).hpz_partition_size == 8


@pytest.mark.parametrize(
    ("stage", "section", "gathered"),
    [
        (3, {}, True),
        (2, {}, False),
        (3, {"lora": {}}, False),
        (3, {"lora": {"merge": True}}, True),
        (2, {"lora": {"merge": True}}, True),
    ],
)
def test_an_export_that_gathers_or_merges_needs_memory_for_whole_weights(
    stage: int, section: Any, gathered: bool
) -> None:
    def host(**changes: Any) -> int:
        user = from_mapping({"zero_optimization": {"stage": stage}}, "ds.json")
        job = job_of(model=section, **changes)
        return MemoryNeeds(plan_inputs(job, user, machine_facts(4)), MODEL, 16).host_bytes(1)

    assert host() - host(export=False) == gathered * 2 * MILLION


def test_a_fused_loss_saves_the_logits_unless_the_run_evaluates() -> None:
    def logits(**data: Any) -> int:
        job = job_of(model={"liger": True}, data=data)
        inputs = plan_inputs(job, from_mapping({}, "ds.json"), machine_facts(4))
        model = MODEL.model_copy(update={"vocab_size": 5000})
        return MemoryNeeds(inputs, model, 16).estimate(1).logits

    assert logits() == 0 < logits(eval=0.1)


def test_a_chunked_loss_has_one_chunk_of_logits_and_the_gradient_of_the_output_layer() -> None:
    model = MODEL.model_copy(update={"vocab_size": 2**16})
    many = Work(512, 16, chunked_loss=True)
    gradient = 2**16 * 8 * (4 + 2)
    assert estimate(model=model, work=many).logits == 512 * 2**16 * (4 + 2) + gradient
    few = Work(4, 16, chunked_loss=True)
    assert estimate(model=model, work=few).logits == 64 * 2**16 * (4 + 2) + gradient
    adapters = model.model_copy(update={"adapted_modules": ("q_proj",), "trainable_parameters": 1000})
    assert estimate(model=adapters, work=few).logits == 64 * 2**16 * (4 + 2)
    assert estimate(model=model, work=few, precision="fp32").logits == (64 + 8) * 2**16 * 4


def test_the_loss_is_chunked_if_the_model_allows_it_and_it_saves_memory() -> None:
    def chunked(section: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **facts: Any) -> bool:
        inputs = plan_inputs(job_of(model=section or {}), from_mapping(config or {}, "ds.json"), machine_facts(4))
        model = MODEL.model_copy(update={"chunked_loss": True, **facts})
        return MemoryNeeds(inputs, model, 16).chunked_loss(4)

    assert chunked()
    assert not chunked(chunked_loss=False)
    assert not chunked({"chunked_loss": False})
    assert not chunked({"torch_compile": True})
    assert not chunked({"liger": True})
    assert not chunked({"dtype": "float16"})
    assert not chunked({"dtype": "float32"}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    # 64 tokens: their logits need less memory than the gradient of a layer with 1024 inputs.
    assert not chunked(hidden_size=1024)
    assert chunked({"chunked_loss": True}, hidden_size=1024)


@pytest.mark.parametrize(
    ("section", "facts", "found"),
    [
        ({"dtype": "float16"}, {"chunked_loss": True}, "in float16 its gradients"),
        ({"torch_compile": True}, {"chunked_loss": True}, "cannot be combined with model.torch_compile"),
        ({}, {"chunked_loss": False}, "the logits of this llama are not only the product of its output layer"),
    ],
)
def test_a_chunked_loss_that_is_set_but_not_possible_is_refused(section: Any, facts: Any, found: str) -> None:
    inputs = plan_inputs(job_of(model={"chunked_loss": True, **section}), from_mapping({}, "ds.json"), machine_facts(4))
    with pytest.raises(RequestError, match=found) as caught:
        check_chunked_loss(inputs, MODEL.model_copy(update=facts))
    assert caught.value.problems[0].key == "model.chunked_loss"


def test_offload_moves_states_to_pinned_host_memory() -> None:
    """Master weights, float32 gradients and two transfer buffers are pinned and rounded up; Adam's moments are not."""
    part = MILLION // 4
    moved = estimate(2, offload=Offload(optimizer="cpu"))
    assert (moved.gradients, moved.optimizer_states) == (0, 0)
    assert moved.offloaded == 8 * part + 1.5 * (4 + 4 + 2 + 2) * part
    assert estimate(2, offload=Offload(optimizer="cpu"), pinned=False).offloaded == (8 + 12) * part
    both = estimate(3, offload=Offload("cpu", "cpu"), pinned=False)
    assert (both.parameters, both.offloaded) == (0, (12 + 4 + 2 + 2) * part)
    disk = estimate(3, offload=Offload("nvme", "nvme"), nvme_parameter_elements=10, pinned=False)
    assert disk.on_nvme == (12 + 4 + 2) * part
    assert disk.offloaded == 2 * part + 4 * 4 * part + 2 * 10


def test_the_total_is_the_memory_on_the_device() -> None:
    found = estimate(2, offload=Offload(optimizer="cpu"))
    parts = {name: value for name, value in found.to_dict().items() if name not in ("offloaded", "on_nvme")}
    assert parts.pop("device_total") == sum(parts.values())
    in_use = sum(parts.values()) - found.fragmentation
    assert found.fragmentation == int(in_use * FRAGMENTATION["cuda"])
    assert host_bytes(found, 4, "cuda", exported=7) == 4 * (PROCESS_BYTES + found.offloaded) + 7
    on_cpu = estimate(2, device="cpu")
    assert on_cpu.base == PROCESS_BYTES
    assert host_bytes(on_cpu, 4, "cpu", exported=0) == 4 * on_cpu.device_total


def test_sizes_are_read_from_the_deepspeed_json() -> None:
    block = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "1e4",
        "stage3_max_live_parameters": 1e7,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    found = zero_sizes(from_mapping({"zero_optimization": block}, "ds.json"), hidden_size=100)
    assert (found.stage, found.reduce_bucket_size, found.prefetch_bucket_size) == (3, 10_000, 9_000)
    assert (found.persistence_threshold, found.max_live_parameters) == (10_000, 10_000_000)
    assert (found.overlap_comm, found.pinned, found.offload) == (True, False, Offload("cpu", "none"))
    assert zero_sizes(from_mapping({}, "ds.json"), 100) == ZeroSizes()
    block = {"stage": 3, "overlap_comm": "false", "prefetch_bucket_size": "auto", "max_reuse_distance": 7}
    found = zero_sizes(from_mapping({"zero_optimization": block}, "ds.json"), hidden_size=100)
    assert (found.overlap_comm, found.prefetch_bucket_size, found.max_reuse_distance) == (False, 9_000, 7)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_estimate_matches_the_measurements(benchmark: ModuleType, tmp_path: Path) -> None:
    """Bytes in use for models of 5M to 100M parameters under all stages, as benchmarks/memory.py measured them."""
    measured = {row["row"]: row for row in json.loads(BENCHMARK.with_suffix(".json").read_text())}
    assert list(measured) == [row.name for row in benchmark.ROWS]
    errors = []
    for row in benchmark.ROWS:
        found = {**measured[row.name], "memory": benchmark.plan_for(row, tmp_path).training.memory}
        errors.append(benchmark.errors_of(found)[0])
        assert abs(errors[-1]) < 0.1, found
    assert len(errors) > 20
    assert abs(fmean(errors)) < 0.02
    assert fmean(map(abs, errors)) < 0.03


def test_a_shorter_reuse_distance_saves_as_much_as_estimated(benchmark: ModuleType, tmp_path: Path) -> None:
    """If activations determine the peak: all, some or none of the weights of a 100M model stay gathered."""
    measured = {row["row"]: row["in_use"] for row in json.loads(BENCHMARK.with_suffix(".json").read_text())}
    rows = [row for row in benchmark.ROWS if row.model == "100M" and row.micro == 4 and not row.section]
    actual = [measured[row.name] for row in rows]
    memories = [benchmark.plan_for(row, tmp_path).training.memory for row in rows]
    estimated = [benchmark.on_device(memory) - memory["fragmentation"] for memory in memories]
    assert len(rows) == 3
    for each in (actual, estimated):
        assert each[1] < 0.95 * each[0]
        assert each[2] < 0.95 * each[1]
    assert estimated == pytest.approx(actual, rel=0.02)


def test_the_benchmark_counts_the_memory_of_the_measured_device(benchmark: ModuleType, tmp_path: Path) -> None:
    """Offloaded states are part of the process on a CPU, and are not counted on a GPU."""
    row = next(row for row in benchmark.ROWS if "offload_optimizer" in row.name)
    on_cpu, on_gpu = (benchmark.plan_for(row, tmp_path, gpus) for gpus in (0, 2))
    assert (on_gpu.world.device, on_gpu.world.size, on_gpu.precision) == ("cuda", 2, "bf16")
    assert benchmark.on_device(on_gpu.training.memory) == on_gpu.training.memory["device_total"]
    memory = on_cpu.training.memory
    whole = memory["device_total"] - memory["base"] + memory["offloaded"]
    assert benchmark.on_device(memory) == whole
