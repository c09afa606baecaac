"""DeepSpeed JSONs that fail as ranks start, or train something else; and neighbours of them that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
CPUS, GPUS, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
OFFLOAD: Config = {"offload_optimizer": {"device": "cpu"}}
LINEAR: Config = {"warmup_num_steps": 2, "warmup_type": "linear"}


@dataclass(frozen=True)
class Row:
    """A JSON that is refused on the devices `where`; the key that lint names, and words of its message or hint.

    `seen`: whether DeepSpeed itself fails on it on CPUs. If not, it takes it and the launcher has a reason of its own,
    or it takes a GPU, or a kernel that is compiled for minutes.
    """

    config: Config
    key: str
    words: tuple[str, ...]
    where: tuple[str, ...] = BOTH
    seen: bool = True

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


TORCH = "torch.optim.AdamW, which is built here (torch_adam, which the launcher sets on CPUs)"
FUSED = "FusedAdam, which is built here (no offload, no torch_adam)"
CPU_ADAM = "DeepSpeedCPUAdam, which is built here (offload, no torch_adam)"
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
    Row({**zero(2), **optimizer(torch_adam=True, differentiable=True)}, f"{PARAMS}.differentiable", ("Take it out",)),
    Row({**zero(2), **optimizer(max_grad_norm=1)}, f"{PARAMS}.max_grad_norm", ("gradient_clipping",)),
    Row(optimizer("LBFGS"), "optimizer.type", ("one parameter group",)),
    Row(optimizer("SparseAdam"), "optimizer.type", ("sparse gradients",)),
    Row({**zero(2), **untested("Adagrad")}, "optimizer.type", ("fails under ZeRO",)),
    Row({**zero(2, **OFFLOAD), **untested("Adagrad")}, "optimizer.type", ("fails under ZeRO",), seen=False),
    Row({**zero(2), **untested("MuAdamW")}, "optimizer.type", ("mup, which is not installed",)),
    Row({**zero(2), **untested("Lamb")}, "optimizer.type", ("FusedLamb", "for GPUs only"), CPUS),
    Row({**zero(2), **optimizer("Lion")}, "optimizer.type", ("FusedLion", "Lion has a CPU version"), CPUS),
    Row({**zero(2, **OFFLOAD), **optimizer("Lamb")}, "optimizer.type", ("Lamb",)),
    Row({**zero(3), **optimizer("Muon")}, "optimizer.type", ("reduce_scatter",), seen=False),
    Row({**zero(2), **optimizer("Muon", muon_lr=1e-3)}, f"{PARAMS}.muon_lr", ("one learning rate",), seen=False),
]
PRECISION = [
    Row(
        {**zero(1), **bf16(bf16_master_weights_and_grads=True)}, "bf16.bf16_master_weights_and_grads", ("no optimizer",)
    ),
    Row({**zero(3), **bf16(bf16_master_weights_and_grads=True)}, "bf16.bf16_master_weights_and_grads", ("offload",)),
    Row(
        {**zero(2, **OFFLOAD), **bf16(bf16_master_weights_and_grads=True)},
        "bf16.bf16_master_weights_and_grads",
        ("torch.optim.AdamW is built", '"torch_adam": false'),
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
    Row({**zero(2), "data_types": {"param_dtype": "float8"}}, "data_types.param_dtype", ("none of its values",)),
    Row({**zero(2), "fp16": {"enabled": True}}, "fp16.enabled", ("no fp16 on a CPU",), CPUS),
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
    Row(zero(2, elastic_checkpoint=True), f"{ZERO}.elastic_checkpoint", ("fails to load",), seen=False),
    Row(zero(2, allgather_bucket_size=500_000_001), f"{ZERO}.allgather_bucket_size", ("odd",)),
    Row(
        zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        f"{ZERO}.offload_optimizer.ratio",
        ("torch.optim.AdamW is built",),
        CPUS,
    ),
    Row(zero(0, **OFFLOAD), f"{ZERO}.offload_optimizer", ("DeepSpeedCPUAdam, which is built here",), GPUS),
    Row(zero(3, offload_optimizer=SUPER), f"{ZERO}.offload_optimizer.super_offload", ("needs GPUs",), CPUS),
    Row(zero(2, zenflow={"overlap_step": False}, **OFFLOAD), f"{ZERO}.zenflow", ("needs ZenFlowCPUAdam",), CPUS),
    Row(zero(2, zenflow={"overlap_step": False}), f"{ZERO}.zenflow", ("without offload",)),
    Row(zero(3, zero_quantized_gradients=True), f"{ZERO}.zero_quantized_gradients", ("no quantizer",), CPUS),
    Row(zero(3, zero_quantized_weights=True), f"{ZERO}.zero_quantized_weights", ("no quantizer",), CPUS),
    Row({**zero(2), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", ("same data",)),
    Row({**zero(2), "pipeline": {"stages": 2}}, "pipeline", ("PipelineModule",), seen=False),
    Row({**zero(2), "managed_gradient_accumulation": False}, "managed_gradient_accumulation", ("accumulation",)),
    Row({**zero(2), "hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled", ("needs GPUs",), CPUS, seen=False),
]
SCHEDULERS = [
    Row(scheduler("WarmupLR", **LINEAR, warmup_min_lr=[0, 0, 0]), f"{SCHEDULE}.warmup_min_lr", ("3 values",)),
    Row(scheduler("WarmupLR", **LINEAR, warmup_max_lr=[1e-5]), f"{SCHEDULE}.warmup_max_lr", ("1 values",)),
    Row(
        scheduler("WarmupLR", **{**LINEAR, "warmup_num_steps": 3.0}), f"{SCHEDULE}.warmup_num_steps", ("whole number",)
    ),
    Row(scheduler("LRRangeTest", lr_range_test_step_size=0), f"{SCHEDULE}.lr_range_test_step_size", ("above 0",)),
    Row(cycle(cycle_first_step_size=0), f"{SCHEDULE}.cycle_first_step_size", ("above 0",)),
    Row(cycle(cycle_second_step_size=-1), f"{SCHEDULE}.cycle_second_step_size", ("from 0 up",)),
    Row(scheduler("WarmupLR", **LINEAR, warmup_min_lr=-1e-4), f"{SCHEDULE}.warmup_min_lr", ("below 0",), seen=False),
    Row(scheduler("WarmupLR", **LINEAR, warmup_max_lr=-1e-4), f"{SCHEDULE}.warmup_max_lr", ("below 0",), seen=False),
    Row(
        scheduler("WarmupDecayLR", total_num_steps=8, **LINEAR, warmup_max_lr=1e-5, warmup_min_lr=[-1e-6, -1e-6]),
        f"{SCHEDULE}.warmup_min_lr",
        ("below 0",),
        seen=False,
    ),
    Row(cycle(cycle_min_lr=-1e-6), f"{SCHEDULE}.cycle_min_lr", ("below 0",), seen=False),
    Row(cycle(decay_step_size=1, decay_lr_rate=-3), f"{SCHEDULE}.decay_lr_rate", ("below 0",), seen=False),
    Row(
        scheduler("LRRangeTest", lr_range_test_min_lr=-1e-6),
        f"{SCHEDULE}.lr_range_test_min_lr",
        ("below 0",),
        seen=False,
    ),
    Row(
        scheduler("LRRangeTest", lr_range_test_min_lr=1e-6, lr_range_test_step_rate=-5),
        f"{SCHEDULE}.lr_range_test_step_rate",
        ("below 0",),
        seen=False,
    ),
    Row(
        cycle(cycle_min_lr=1e-4, cycle_momentum=False),
        f"{SCHEDULE}.cycle_min_lr",
        ("starts at 0.0001, above the peak of 1e-05",),
        seen=False,
    ),
    Row(cycle(cycle_max_mom=1.5), f"{SCHEDULE}.cycle_max_mom", ("momentum is from 0 to below 1",), seen=False),
    Row(scheduler("WarmupLR", **LINEAR, warmup_max_lr="1e-5x"), f"{SCHEDULE}.warmup_max_lr", ("number",), seen=False),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr=True),
        f"{SCHEDULE}.warmup_max_lr",
        ("takes for the number 1",),
        seen=False,
    ),
    Row(
        scheduler("WarmupDecayLR", **LINEAR, warmup_max_lr=1e-5, total_num_steps=float("nan")),
        f"{SCHEDULE}.total_num_steps",
        ("which JSON does not have",),
        seen=False,
    ),
    Row(
        {**zero(0), **scheduler("StepLR", step_size=3)},
        "scheduler.type",
        ("StepLR is PyTorch's", "WarmupDecayLR"),
        seen=False,
    ),
    *(
        Row(
            scheduler("WarmupCosineLR", total_num_steps=8, **LINEAR, **{name: value}),
            f"{SCHEDULE}.{name}",
            ("from 0 to 1",),
            seen=False,
        )
        for name, value in (("cos_min_ratio", 3), ("cos_min_ratio", -0.1), ("warmup_min_ratio", 2))
    ),
    Row(
        scheduler("WarmupLR", **LINEAR, warmup_max_lr=[1e-5, 1e-6]),
        f"{SCHEDULE}.warmup_max_lr",
        ("one learning rate",),
        seen=False,
    ),
]
ELSEWHERE = [
    Row({"wandb": {"enabled": True}}, "wandb.enabled", ("pip install wandb",)),
    Row({"tensorboard": {"enabled": True}}, "tensorboard.enabled", ("pip install tensorboard",)),
    Row({"comet": {"enabled": True}}, "comet.enabled", ("pip install comet-ml",)),
    Row({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer", ("CROSS_SIZE",)),
    Row({"steps_per_print": 0}, "steps_per_print", ("null",)),
]
REFUSED = [*OPTIMIZERS, *PRECISION, *COMMUNICATION, *STAGES, *SCHEDULERS, *ELSEWHERE]

FINE: list[Config] = [
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
"""On CPUs and on GPUs."""
