"""DeepSpeed JSONs that fail when ranks start, or do not train what the user wants; and similar ones that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
CPUS, GPUS, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
OFFLOAD: Config = {"offload_optimizer": {"device": "cpu"}}
LINEAR: Config = {"warmup_num_steps": 2, "warmup_type": "linear"}


@dataclass(frozen=True)
class Row:
    """A JSON that lint rejects on the devices `where`; the key of the error, and words of its message or hint.

    `fails_on_cpu`: whether DeepSpeed itself fails on it on CPUs. If not, DeepSpeed accepts it, or the test would need
    a GPU or a kernel that takes minutes to compile.
    """

    config: Config
    key: str
    words: tuple[str, ...]
    where: tuple[str, ...] = BOTH
    fails_on_cpu: bool = True

    @property
    def id(self) -> str:
        return f"{self.key.rpartition('.')[2]}: {self.words[0][:40]}"


def zero(stage: int, **keys: Any) -> Config:
    return {"zero_optimization": {"stage": stage, **keys}}


def optimizer(kind: str = "AdamW", **params: Any) -> Config:
    return {"optimizer": {"type": kind, "params": {"lr": 1e-5, **params}}}


def untested(kind: str) -> Config:
    return {**optimizer(kind), "zero_allow_untested_optimizer": True}


def scheduler(kind: str, **params: Any) -> Config:
    return {**optimizer(), "scheduler": {"type": kind, "params": params}}


def cycle(**params: Any) -> Config:
    return scheduler("OneCycle", **{"cycle_min_lr": 1e-6, "cycle_max_lr": 1e-5, "cycle_first_step_size": 2, **params})


def bf16(**keys: Any) -> Config:
    return {"bf16": {"enabled": True, **keys}}


TORCH = "torch.optim.AdamW, which DeepSpeed builds here (torch_adam, which the launcher sets on CPUs)"
FUSED = "FusedAdam, which DeepSpeed builds here (no offload, no torch_adam)"
CPU_ADAM = "DeepSpeedCPUAdam, which DeepSpeed builds here (offload, no torch_adam)"
PARAMS, ZERO, SCHEDULE = "optimizer.params", "zero_optimization", "scheduler.params"
SUPER = {"device": "cpu", "super_offload": True}

OPTIMIZERS = [
    Row({**zero(2), **optimizer(adamw_mode=True)}, f"{PARAMS}.adamw_mode", ("no such parameter",)),
    Row({**zero(2), **optimizer(bias_correction=True)}, f"{PARAMS}.bias_correction", (TORCH, "FusedAdam"), CPUS),
    Row({**zero(2), **optimizer(set_grad_none=True)}, f"{PARAMS}.set_grad_none", (TORCH, "only FusedAdam"), CPUS),
    Row({**zero(2), **optimizer(foreach=True)}, f"{PARAMS}.foreach", (FUSED, "only torch.optim.AdamW"), GPUS),
    Row({**zero(2, **OFFLOAD), **optimizer(fused=True)}, f"{PARAMS}.fused", (CPU_ADAM,), GPUS),
    Row({**zero(2), **optimizer(amsgrad=True)}, f"{PARAMS}.amsgrad", (FUSED, '"torch_adam": true'), GPUS),
    Row({**zero(2), **optimizer(torch_adam=True, capturable=True)}, f"{PARAMS}.capturable", ("CUDA graphs",), CPUS),
    Row({**zero(2), **optimizer(torch_adam=True, differentiable=True)}, f"{PARAMS}.differentiable", ("Remove it",)),
    Row({**zero(2), **optimizer(max_grad_norm=1)}, f"{PARAMS}.max_grad_norm", ("gradient_clipping",)),
    Row(optimizer("LBFGS"), "optimizer.type", ("one parameter group",)),
    Row(optimizer("SparseAdam"), "optimizer.type", ("sparse gradients",)),
    Row({**zero(2), **untested("Adagrad")}, "optimizer.type", ("fails under ZeRO",)),
    Row({**zero(2, **OFFLOAD), **untested("Adagrad")}, "optimizer.type", ("fails under ZeRO",), fails_on_cpu=False),
    Row({**zero(2), **untested("MuAdamW")}, "optimizer.type", ("mup, which is not installed",)),
    Row({**zero(2), **untested("Lamb")}, "optimizer.type", ("FusedLamb", "needs GPUs"), CPUS),
    Row({**zero(2), **optimizer("Lion")}, "optimizer.type", ("FusedLion", "Lion has a CPU version"), CPUS),
    Row({**zero(2, **OFFLOAD), **optimizer("Lamb")}, "optimizer.type", ("Lamb",)),
    Row({**zero(3), **optimizer("Muon")}, "optimizer.type", ("reduce_scatter",), fails_on_cpu=False),
    Row(
        {**zero(2), **optimizer("Muon", muon_lr=1e-3)}, f"{PARAMS}.muon_lr", ("one learning rate",), fails_on_cpu=False
    ),
]
PRECISION = [
    Row(
        {**zero(1), **bf16(bf16_master_weights_and_grads=True)}, "bf16.bf16_master_weights_and_grads", ("no optimizer",)
    ),
    Row({**zero(3), **bf16(bf16_master_weights_and_grads=True)}, "bf16.bf16_master_weights_and_grads", ("offload",)),
    Row(
        {**zero(2, **OFFLOAD), **bf16(bf16_master_weights_and_grads=True)},
        "bf16.bf16_master_weights_and_grads",
        ("DeepSpeed builds torch.optim.AdamW", '"torch_adam": false'),
        CPUS,
    ),
    Row(
        {**zero(0), **bf16(), "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype",
        ("without ZeRO",),
    ),
    Row(
        {**zero(0), "bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "bf16"}},
        "data_types.grad_accum_dtype",
        ("without ZeRO",),
    ),
    Row({**zero(2), **bf16(), "data_types": {"param_dtype": "fp32"}}, "data_types.param_dtype", ("Write bf16",)),
    Row({**zero(2), "data_types": {"param_dtype": "float8"}}, "data_types.param_dtype", ("not an allowed value",)),
    Row({**zero(2), "fp16": {"enabled": True}}, "fp16.enabled", ("not support fp16 on CPUs",), CPUS),
]
COMMUNICATION = [
    Row({**zero(2), "gradient_allreduce_op": "avg"}, "gradient_allreduce_op", ("mean",)),
    Row({**zero(3), "gradient_allreduce_op": "sum"}, "gradient_allreduce_op", ("stage 3",)),
    Row({**zero(2), "prescale_gradients": True}, "prescale_gradients", ("reduce_scatter",)),
    Row({**zero(3), "prescale_gradients": True}, "prescale_gradients", ("reduce_scatter",)),
    Row({**zero(2), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor", ("reduce_scatter",)),
]
STAGES = [
    Row({**zero(2, compute_grad_norm=False), "gradient_clipping": 1.0}, f"{ZERO}.compute_grad_norm", ("clipping 1",)),
    Row(zero(3, compute_grad_norm=False), f"{ZERO}.compute_grad_norm", ("stage 3",)),
    Row(zero(2, compute_grad_norm=False, **OFFLOAD), f"{ZERO}.compute_grad_norm", ("offloaded",)),
    Row(zero(1, legacy_stage1=True), f"{ZERO}.legacy_stage1", ("0.5.9",)),
    Row(zero(2, elastic_checkpoint=True), f"{ZERO}.elastic_checkpoint", ("fails to load",), fails_on_cpu=False),
    Row(zero(2, allgather_bucket_size=500_000_001), f"{ZERO}.allgather_bucket_size", ("odd",)),
    Row(
        zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        f"{ZERO}.offload_optimizer.ratio",
        ("DeepSpeed builds torch.optim.AdamW",),
        CPUS,
    ),
    Row(zero(0, **OFFLOAD), f"{ZERO}.offload_optimizer", ("DeepSpeedCPUAdam, which DeepSpeed builds here",), GPUS),
    Row(zero(3, offload_optimizer=SUPER), f"{ZERO}.offload_optimizer.super_offload", ("needs GPUs",), CPUS),
    Row(zero(2, zenflow={"overlap_step": False}, **OFFLOAD), f"{ZERO}.zenflow", ("needs ZenFlowCPUAdam",), CPUS),
    Row(zero(2, zenflow={"overlap_step": False}), f"{ZERO}.zenflow", ("without offload",)),
    Row(zero(3, zero_quantized_gradients=True), f"{ZERO}.zero_quantized_gradients", ("no quantizer",), CPUS),
    Row(zero(3, zero_quantized_weights=True), f"{ZERO}.zero_quantized_weights", ("no quantizer",), CPUS),
    Row({**zero(2), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", ("same data",)),
    Row({**zero(2), "pipeline": {"stages": 2}}, "pipeline", ("PipelineModule",), fails_on_cpu=False),
    Row({**zero(2), "managed_gradient_accumulation": False}, "managed_gradient_accumulation", ("accumulation",)),
    Row(
        {**zero(2), "hybrid_engine": {"enabled": True}},
        "hybrid_engine.enabled",
        ("needs GPUs",),
        CPUS,
        fails_on_cpu=False,
    ),
]
SCHEDULERS = [
    Row(scheduler("WarmupLR", **LINEAR, warmup_min_lr=[0, 0, 0]), f"{SCHEDULE}.warmup_min_lr", ("3 values",)),
    Row(scheduler("WarmupLR", **LINEAR, warmup_max_lr=[1e-5]), f"{SCHEDULE}.warmup_max_lr", ("1 values",)),
    Row(
        scheduler("WarmupLR", **{**LINEAR, "warmup_num_steps": 3.0}), f"{SCHEDULE}.warmup_num_steps", ("whole number",)
    ),
    Row(scheduler("LRRangeTest", lr_range_test_step_size=0), f"{SCHEDULE}.lr_range_test_step_size", ("above 0",)),
    Row(cycle(cycle_first_step_size=0), f"{SCHEDULE}.cycle_first_step_size", ("above 0",)),
    Row(cycle(cycle_second_step_size=-1), f"{SCHEDULE}.cycle_second_step_size", ("at least 0",)),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_min_lr=-1e-4),
        f"{SCHEDULE}.warmup_min_lr",
        ("below 0",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr=-1e-4),
        f"{SCHEDULE}.warmup_max_lr",
        ("below 0",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("WarmupDecayLR", total_num_steps=8, **LINEAR, warmup_max_lr=1e-5, warmup_min_lr=[-1e-6, -1e-6]),
        f"{SCHEDULE}.warmup_min_lr",
        ("below 0",),
        fails_on_cpu=False,
    ),
    Row(cycle(cycle_min_lr=-1e-6), f"{SCHEDULE}.cycle_min_lr", ("below 0",), fails_on_cpu=False),
    Row(cycle(decay_step_size=1, decay_lr_rate=-3), f"{SCHEDULE}.decay_lr_rate", ("below 0",), fails_on_cpu=False),
    Row(
        scheduler("LRRangeTest", lr_range_test_min_lr=-1e-6),
        f"{SCHEDULE}.lr_range_test_min_lr",
        ("below 0",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("LRRangeTest", lr_range_test_min_lr=1e-6, lr_range_test_step_rate=-5),
        f"{SCHEDULE}.lr_range_test_step_rate",
        ("below 0",),
        fails_on_cpu=False,
    ),
    Row(
        cycle(cycle_min_lr=1e-4, cycle_momentum=False),
        f"{SCHEDULE}.cycle_min_lr",
        ("starts at 0.0001, above the peak of 1e-05",),
        fails_on_cpu=False,
    ),
    Row(
        cycle(cycle_max_mom=1.5),
        f"{SCHEDULE}.cycle_max_mom",
        ("momentum must be at least 0 and below 1",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr="1e-5x"),
        f"{SCHEDULE}.warmup_max_lr",
        ("number",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr=True),
        f"{SCHEDULE}.warmup_max_lr",
        ("reads as the number 1",),
        fails_on_cpu=False,
    ),
    Row(
        scheduler("WarmupDecayLR", **LINEAR, warmup_max_lr=1e-5, total_num_steps=float("nan")),
        f"{SCHEDULE}.total_num_steps",
        ("which is not valid JSON",),
        fails_on_cpu=False,
    ),
    Row(
        {**zero(0), **scheduler("StepLR", step_size=3)},
        "scheduler.type",
        ("StepLR is a PyTorch scheduler", "WarmupDecayLR"),
        fails_on_cpu=False,
    ),
    *(
        Row(
            scheduler("WarmupCosineLR", total_num_steps=8, **LINEAR, **{name: value}),
            f"{SCHEDULE}.{name}",
            ("from 0 to 1",),
            fails_on_cpu=False,
        )
        for name, value in (("cos_min_ratio", 3), ("cos_min_ratio", -0.1), ("warmup_min_ratio", 2))
    ),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr=[1e-5, 1e-6]),
        f"{SCHEDULE}.warmup_max_lr",
        ("one learning rate",),
        fails_on_cpu=False,
    ),
]
OTHERS = [
    Row({"wandb": {"enabled": True}}, "wandb.enabled", ("pip install wandb",)),
    Row({"tensorboard": {"enabled": True}}, "tensorboard.enabled", ("pip install tensorboard",)),
    Row({"comet": {"enabled": True}}, "comet.enabled", ("pip install comet-ml",)),
    Row({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer", ("CROSS_SIZE",)),
    Row({"steps_per_print": 0}, "steps_per_print", ("null",)),
]
REJECTED = [*OPTIMIZERS, *PRECISION, *COMMUNICATION, *STAGES, *SCHEDULERS, *OTHERS]

ACCEPTED: list[Config] = [
    {**zero(2), **optimizer(foreach=True, torch_adam=True)},
    {**zero(2), **optimizer(torch_adam=True, amsgrad=True)},
    {**zero(2), **optimizer(torch_adam=True, fp32_optimizer_states=True, adam_w_mode=True)},
    {**zero(1), **bf16(), "data_types": {"grad_accum_dtype": "fp32"}},
    {**zero(2), **bf16(), "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bfloat16"}},
    {**zero(2, reduce_scatter=False), "prescale_gradients": True, "gradient_predivide_factor": 2.0},
    {**zero(1), "prescale_gradients": True},
    {**zero(2), "gradient_allreduce_op": "SUM"},
    {**zero(2, compute_grad_norm=False), "gradient_clipping": 0},
    zero(2, compute_grad_norm=False),
    zero(3, zero_hpz_partition_size=8),
    zero(3, zero_hpz_partition_size=2),
    {**zero(2), "steps_per_print": float("inf")},
    {**zero(2), "steps_per_print": -1},
    {**zero(2), "comms_config": {"enabled": True}, "whatever": 1},
    {**zero(2), "tensorboard": {"enabled": False}},
    {**zero(2), "activation_checkpointing": {"partition_activations": True}, "autotuning": {"enabled": False}},
    {**zero(2), **scheduler("WarmupLR", **LINEAR, warmup_min_lr=[0, 0], warmup_max_lr=[1e-5, 1e-5])},
    {**zero(2), **cycle(cycle_second_step_size=0)},
    {**zero(0), **optimizer("SGD")},
]
"""JSONs that run on CPUs and on GPUs."""
