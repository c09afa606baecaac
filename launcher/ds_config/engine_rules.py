"""What the engine of DeepSpeed 0.19.8 rejects at its start or first update: precision, communication and ZeRO keys."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.ds_config.facts import AUTO, as_bool, bf16_key, parse_dtype, zero_value
from launcher.ds_config.findings import Finding
from launcher.ds_config.optimizer_rules import needs_cpu_adam
from launcher.ds_config.rule_context import ZERO, Rule, RuleContext

_CPU_CLASSES = ("DeepSpeedCPUAdam", "ZenFlowCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad")
_FOR_CPUS = "the JSON is checked for CPUs"


def _dtypes(context: RuleContext) -> Iterator[Finding]:
    for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        path = f"data_types.{name}"
        value = context.config.get(path)
        if value not in (None, AUTO) and parse_dtype(value) is None and value not in ("int8", "torch.int8"):
            yield context.finding("error", path, f"{value!r} is not an allowed value", "Use fp32, bf16 or fp16.")
    yield from _param_dtype(context)
    yield from _grad_accum_dtype(context)


def _param_dtype(context: RuleContext) -> Iterator[Finding]:
    path = "data_types.param_dtype"
    named = parse_dtype(context.config.get(path))
    if named is not None and context.dtype is not None and named != context.dtype:
        message = f"found {named}, but the bf16 and fp16 blocks make the weights {context.dtype}: DeepSpeed fails"
        yield context.finding("error", path, message, f"Write {context.dtype}, or remove it.")


def _grad_accum_dtype(context: RuleContext) -> Iterator[Finding]:
    path = "data_types.grad_accum_dtype"
    named, dtype = parse_dtype(context.config.get(path)), context.dtype
    if named is None or dtype is None or named == dtype:
        return
    if context.stage == 0:
        message = f"{named} with {dtype} weights fails without ZeRO"
        yield context.finding("error", path, message, f"Set {ZERO}.stage to 1, 2 or 3, or remove it.")


def _master_weights(context: RuleContext) -> Iterator[Finding]:
    for block, key in (
        (bf16_key(context.config), "bf16_master_weights_and_grads"),
        ("fp16", "fp16_master_weights_and_grads"),
    ):
        if context.stage and context.on(f"{block}.enabled") and context.on(f"{block}.{key}"):
            yield from needs_cpu_adam(context, f"{block}.{key}", "it")


def _fp16(context: RuleContext) -> Iterator[Finding]:
    if context.cpu and context.on("fp16.enabled"):
        message = f"DeepSpeed does not support fp16 on CPUs; {_FOR_CPUS}"
        yield context.finding("error", "fp16.enabled", message, "Use bf16 or fp32.")
    scale = context.number("fp16.loss_scale")
    if context.optimizer_class and context.optimizer_class.name == "FusedLamb" and scale and not context.cpu:
        message = f"{scale!r} is a static loss scale, and DeepSpeed's Lamb needs a dynamic one"
        yield context.finding("error", "fp16.loss_scale", message, "Write 0.")


def _communication(context: RuleContext) -> Iterator[Finding]:
    operation = context.config.get("gradient_allreduce_op")
    path = "gradient_allreduce_op"
    if operation is not None and operation != AUTO and str(operation).lower() not in ("mean", "sum"):
        yield context.finding("error", path, f"{operation!r} is not an allowed value", 'Write "mean", the default.')
    summed = str(operation).lower() == "sum"
    if summed and context.stage == 3:
        yield context.finding("error", path, '"sum" fails with stage 3', 'Write "mean".')
    if summed and context.config.get(f"{ZERO}.zenflow") not in (None, AUTO):
        yield context.finding("error", path, '"sum" fails with ZenFlow', 'Write "mean".')
    if context.off(f"{ZERO}.reduce_scatter") or context.stage not in (2, 3) or summed:
        return
    factor = context.number("gradient_predivide_factor")
    hint = f"Remove it, or set {ZERO}.reduce_scatter to false."
    if context.on("prescale_gradients"):
        message = f"fails under stage {context.stage} with reduce_scatter, which is on by default"
        yield context.finding("error", "prescale_gradients", message, hint)
    if factor is not None and factor != 1:
        message = f"a value other than 1 fails under stage {context.stage} with reduce_scatter, which is on by default"
        yield context.finding("error", "gradient_predivide_factor", message, hint)


def _gradient_norm(context: RuleContext) -> Iterator[Finding]:
    path = f"{ZERO}.compute_grad_norm"
    if not context.off(path):
        return
    clipping = context.number("gradient_clipping")
    if context.stage in (0, 3):
        yield context.finding("error", path, f"fails under stage {context.stage}", "Remove it.")
    elif context.offloaded:
        yield context.finding("error", path, "fails with an offloaded optimizer", "Remove it.")
    elif clipping:
        message = f"fails with gradient_clipping {clipping:g}, which needs the norm"
        yield context.finding("error", path, message, "Remove it, or set gradient_clipping to 0.")
    elif (
        context.stage == 1
        and context.dtype == "bf16"
        and parse_dtype(context.config.get("data_types.grad_accum_dtype")) == "fp32"
    ):
        message = "fails under stage 1 in bf16 with data_types.grad_accum_dtype fp32"
        yield context.finding("error", path, message, "Remove one of the two.")


def _zero_keys(context: RuleContext) -> Iterator[Finding]:
    if context.on(f"{ZERO}.legacy_stage1") and context.stage:
        message = "DeepSpeed removed the old form of stage 1 in 0.5.9, and fails"
        yield context.finding("error", f"{ZERO}.legacy_stage1", message, "Remove it.")
    if context.on(f"{ZERO}.elastic_checkpoint"):
        message = "DeepSpeed saves such checkpoints but fails to load them"
        hint = "Remove it: launcher resume does not need it to change the number of ranks."
        yield context.finding("error", f"{ZERO}.elastic_checkpoint", message, hint)
    bucket = context.number(f"{ZERO}.allgather_bucket_size")
    if bucket is not None and bucket % 2 and context.stage in (1, 2):
        yield context.finding("error", f"{ZERO}.allgather_bucket_size", "an odd number fails", "Write an even number.")


def updates_only_host_memory(context: RuleContext) -> bool:
    """Whether the optimizer class only updates parameters in host memory, while they are on a GPU."""
    return not context.cpu and context.optimizer_class is not None and context.optimizer_class.name in _CPU_CLASSES


def _offload_without_zero(context: RuleContext) -> Iterator[Finding]:
    if context.stage == 0 and context.offloaded and updates_only_host_memory(context):
        message = (
            f"fails under stage 0: parameters stay on the GPU, and {context.optimizer_class} only updates host memory"
        )
        yield context.finding("error", f"{ZERO}.offload_optimizer", message, "Set stage to 1, 2 or 3, or remove it.")


def _offload_options(context: RuleContext) -> Iterator[Finding]:
    block = f"{ZERO}.offload_optimizer"
    if not context.offloaded or context.stage != 3:
        return
    ratio = context.number(f"{block}.ratio")
    if ratio is not None and ratio < 1:
        yield from needs_cpu_adam(context, f"{block}.ratio", "a ratio below 1")
    if context.on(f"{block}.super_offload"):
        if context.cpu:
            message = f"SuperOffload needs GPUs; {_FOR_CPUS}"
            yield context.finding("error", f"{block}.super_offload", message, "Remove it on CPUs.")
        else:
            yield from needs_cpu_adam(context, f"{block}.super_offload", "SuperOffload")


def _quantized(context: RuleContext) -> Iterator[Finding]:
    names = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    for name in names:
        if context.cpu and context.stage == 3 and context.on(f"{ZERO}.{name}"):
            message = f"DeepSpeed has no quantizer for CPUs; {_FOR_CPUS}"
            yield context.finding("error", f"{ZERO}.{name}", message, "Remove the key on CPUs.")


def _hybrid_engine(context: RuleContext) -> Iterator[Finding]:
    if context.cpu and context.on("hybrid_engine.enabled"):
        message = f"the hybrid engine needs GPUs; {_FOR_CPUS}"
        yield context.finding("error", "hybrid_engine.enabled", message, "Switch it off.")


def _hpz(context: RuleContext) -> Iterator[Finding]:
    """DeepSpeed reduces a group above the world size to it; a smaller group must divide it."""
    path = f"{ZERO}.zero_hpz_partition_size"
    ranks, world = context.number(path), context.target.world_size
    if world and ranks and ranks >= 1 and context.stage == 3 and world % int(min(ranks, world)):
        message = f"{ranks} does not divide the world size {world}"
        yield context.finding("error", path, message, "Set it to the number of GPUs per node.")


def _muon(context: RuleContext) -> Iterator[Finding]:
    name = context.keys.optimizer_name(str(context.config.get("optimizer.type")))
    if name == "muon" and context.stage == 3 and as_bool(zero_value(context.config, "reduce_scatter")) is not False:
        message = "Muon fails under stage 3 with reduce_scatter, which is on by default"
        yield context.finding("error", "optimizer.type", message, f"Set {ZERO}.reduce_scatter to false, or stage to 2.")


def _writer(context: RuleContext) -> Iterator[Finding]:
    if context.config.get("checkpoint.writer") not in (None, AUTO):
        message = "the fast writer needs CROSS_SIZE and CROSS_RANK, which only DeepSpeed's own launcher sets"
        hint = "Remove it: DeepSpeed then writes checkpoints with torch.save."
        yield context.finding("error", "checkpoint.writer", message, hint)


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
