"""What the engine of DeepSpeed 0.19.8 refuses as it starts, or at its first update: mixes of precision, communication
and ZeRO's own keys."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.ds_config.case import ZERO, Case, Rule
from launcher.ds_config.facts import AUTO, as_bool, bf16_key, dtype_named, zero_value
from launcher.ds_config.findings import Finding
from launcher.ds_config.optimizer_rules import needs_cpu_adam

_CPU_CLASSES = ("DeepSpeedCPUAdam", "ZenFlowCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad")
_FOR_CPUS = "this is checked for CPUs"


def _dtypes(case: Case) -> Iterator[Finding]:
    for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        path = f"data_types.{name}"
        value = case.config.get(path)
        if value not in (None, AUTO) and dtype_named(value) is None and value not in ("int8", "torch.int8"):
            yield case.found("error", path, f"{value!r} is none of its values", "Take fp32, bf16 or fp16.")
    yield from _param_dtype(case)
    yield from _grad_accum_dtype(case)


def _param_dtype(case: Case) -> Iterator[Finding]:
    path = "data_types.param_dtype"
    named = dtype_named(case.config.get(path))
    if named is not None and case.dtype is not None and named != case.dtype:
        message = f"{named}, while the weights are {case.dtype} by the bf16 and fp16 blocks: DeepSpeed fails on it"
        yield case.found("error", path, message, f"Write {case.dtype}, or take it out.")


def _grad_accum_dtype(case: Case) -> Iterator[Finding]:
    path = "data_types.grad_accum_dtype"
    named, dtype = dtype_named(case.config.get(path)), case.dtype
    if named is None or dtype is None or named == dtype:
        return
    if case.stage == 0:
        message = f"{named} with {dtype} weights fails without ZeRO"
        yield case.found("error", path, message, f"Set {ZERO}.stage to 1, 2 or 3, or take it out.")


def _master_weights(case: Case) -> Iterator[Finding]:
    for block, key in (
        (bf16_key(case.config), "bf16_master_weights_and_grads"),
        ("fp16", "fp16_master_weights_and_grads"),
    ):
        if case.stage and case.on(f"{block}.enabled") and case.on(f"{block}.{key}"):
            yield from needs_cpu_adam(case, f"{block}.{key}", "it")


def _fp16(case: Case) -> Iterator[Finding]:
    if case.cpu and case.on("fp16.enabled"):
        message = f"DeepSpeed has no fp16 on a CPU; {_FOR_CPUS}"
        yield case.found("error", "fp16.enabled", message, "Use bf16 or fp32.")
    scale = case.number("fp16.loss_scale")
    if case.built and case.built.name == "FusedLamb" and scale and not case.cpu:
        message = f"a loss scale of {scale!r} is fixed, and DeepSpeed's Lamb needs one that adapts"
        yield case.found("error", "fp16.loss_scale", message, "Write 0.")


def _communication(case: Case) -> Iterator[Finding]:
    operation = case.config.get("gradient_allreduce_op")
    path = "gradient_allreduce_op"
    if operation is not None and operation != AUTO and str(operation).lower() not in ("mean", "sum"):
        yield case.found("error", path, f"{operation!r} is none of its values", 'Write "mean", the default.')
    summed = str(operation).lower() == "sum"
    if summed and case.stage == 3:
        yield case.found("error", path, '"sum" fails with stage 3', 'Write "mean".')
    if summed and case.config.get(f"{ZERO}.zenflow") not in (None, AUTO):
        yield case.found("error", path, '"sum" fails with ZenFlow', 'Write "mean".')
    if case.off(f"{ZERO}.reduce_scatter") or case.stage not in (2, 3) or summed:
        return
    factor = case.number("gradient_predivide_factor")
    hint = f"Take it out, or set {ZERO}.reduce_scatter to false."
    if case.on("prescale_gradients"):
        message = f"fails under stage {case.stage} with reduce_scatter, which is on by default"
        yield case.found("error", "prescale_gradients", message, hint)
    if factor is not None and factor != 1:
        message = f"other than 1, it fails under stage {case.stage} with reduce_scatter, which is on by default"
        yield case.found("error", "gradient_predivide_factor", message, hint)


def _gradient_norm(case: Case) -> Iterator[Finding]:
    path = f"{ZERO}.compute_grad_norm"
    if not case.off(path):
        return
    clipping = case.number("gradient_clipping")
    if case.stage in (0, 3):
        yield case.found("error", path, f"fails under stage {case.stage}", "Take it out.")
    elif case.offloaded:
        yield case.found("error", path, "fails with an offloaded optimizer", "Take it out.")
    elif clipping:
        message = f"fails with gradient_clipping {clipping:g}, which needs the norm"
        yield case.found("error", path, message, "Take it out, or set gradient_clipping to 0.")
    elif (
        case.stage == 1
        and case.dtype == "bf16"
        and dtype_named(case.config.get("data_types.grad_accum_dtype")) == "fp32"
    ):
        message = "fails under stage 1 in bf16 with data_types.grad_accum_dtype fp32"
        yield case.found("error", path, message, "Take one of the two out.")


def _zero_keys(case: Case) -> Iterator[Finding]:
    if case.on(f"{ZERO}.legacy_stage1") and case.stage:
        message = "DeepSpeed has had no old form of stage 1 since 0.5.9, and fails"
        yield case.found("error", f"{ZERO}.legacy_stage1", message, "Take it out.")
    if case.on(f"{ZERO}.elastic_checkpoint"):
        message = "DeepSpeed saves such checkpoints and fails to load them"
        hint = "Take it out: launcher resume continues on another number of ranks without it."
        yield case.found("error", f"{ZERO}.elastic_checkpoint", message, hint)
    bucket = case.number(f"{ZERO}.allgather_bucket_size")
    if bucket is not None and bucket % 2 and case.stage in (1, 2):
        yield case.found("error", f"{ZERO}.allgather_bucket_size", "an odd number fails", "Write an even number.")


def updates_on_cpu(case: Case) -> bool:
    """Whether the class that is built updates parameters in host memory alone, and they are on a GPU."""
    return not case.cpu and case.built is not None and case.built.name in _CPU_CLASSES


def _offload_without_zero(case: Case) -> Iterator[Finding]:
    if case.stage == 0 and case.offloaded and updates_on_cpu(case):
        message = f"fails under stage 0: parameters stay on the GPU, and {case.built} updates them in host memory"
        yield case.found("error", f"{ZERO}.offload_optimizer", message, "Set stage to 1, 2 or 3, or take it out.")


def _offload_options(case: Case) -> Iterator[Finding]:
    block = f"{ZERO}.offload_optimizer"
    if not case.offloaded or case.stage != 3:
        return
    ratio = case.number(f"{block}.ratio")
    if ratio is not None and ratio < 1:
        yield from needs_cpu_adam(case, f"{block}.ratio", "a ratio below 1")
    if case.on(f"{block}.super_offload"):
        if case.cpu:
            message = f"SuperOffload needs GPUs; {_FOR_CPUS}"
            yield case.found("error", f"{block}.super_offload", message, "Take it out on CPUs.")
        else:
            yield from needs_cpu_adam(case, f"{block}.super_offload", "SuperOffload")


def _quantized(case: Case) -> Iterator[Finding]:
    names = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    for name in names:
        if case.cpu and case.stage == 3 and case.on(f"{ZERO}.{name}"):
            message = f"DeepSpeed has no quantizer on a CPU; {_FOR_CPUS}"
            yield case.found("error", f"{ZERO}.{name}", message, "Leave the key out on CPUs.")


def _hybrid_engine(case: Case) -> Iterator[Finding]:
    if case.cpu and case.on("hybrid_engine.enabled"):
        message = f"the hybrid engine needs GPUs; {_FOR_CPUS}"
        yield case.found("error", "hybrid_engine.enabled", message, "Switch it off.")


def _hpz(case: Case) -> Iterator[Finding]:
    """A group larger than the world is cut to it; a smaller one must divide it."""
    path = f"{ZERO}.zero_hpz_partition_size"
    ranks, world = case.number(path), case.target.world_size
    if world and ranks and ranks >= 1 and case.stage == 3 and world % min(int(ranks), world):
        message = f"{ranks} does not divide the world size {world}"
        yield case.found("error", path, message, "Set it to the number of GPUs of one node.")


def _muon(case: Case) -> Iterator[Finding]:
    name = case.keys.optimizer_name(str(case.config.get("optimizer.type")))
    if name == "muon" and case.stage == 3 and as_bool(zero_value(case.config, "reduce_scatter")) is not False:
        message = "Muon fails under stage 3 with reduce_scatter, which is on by default"
        yield case.found("error", "optimizer.type", message, f"Set {ZERO}.reduce_scatter to false, or stage to 2.")


def _writer(case: Case) -> Iterator[Finding]:
    if case.config.get("checkpoint.writer") not in (None, AUTO):
        message = "the fast writer needs CROSS_SIZE and CROSS_RANK, which DeepSpeed's own launcher alone sets"
        hint = "Take it out: checkpoints are then written with torch.save."
        yield case.found("error", "checkpoint.writer", message, hint)


ENGINE_RULES: tuple[Rule, ...] = (
    _dtypes,
    _master_weights,
    _fp16,
    _communication,
    _gradient_norm,
    _zero_keys,
    _offload_without_zero,
    _offload_options,
    _quantized,
    _hybrid_engine,
    _hpz,
    _muon,
    _writer,
)
