"""What the options of the model section need from the machine, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.ds_config import DsConfig, zero_stage
from launcher.ds_config.facts import as_bool
from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import PlanInputs
from launcher.plan.schema import World

_FLASH = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
"""The package of each; without it transformers uses the package `kernels`."""
_INSTALL = "pip install {package} in the launcher's environment, on every node"


def check_model_options(inputs: PlanInputs[Job]) -> None:
    """Raises RequestError with every option of the model section that does not work here or with another option."""
    job, user, world, machine = inputs.job, inputs.ds_config, inputs.world, inputs.machine
    problems = [
        *_lora(job, machine),
        *_liger(job, world, machine),
        *_compile(job, world, machine),
        *_attention(job, world, machine),
        *_sequence_parallel(job, user),
    ]
    if problems:
        raise RequestError(*problems)


def _lora(job: Job, machine: MachineFacts) -> Iterator[Problem]:
    if job.model.lora is not None and _missing("peft", machine):
        yield Problem("peft is not installed", key="model.lora", hint=_INSTALL.format(package="peft"))


def _liger(job: Job, world: World, machine: MachineFacts) -> Iterator[Problem]:
    if not job.model.liger:
        return
    if world.device == "cpu":
        yield Problem(
            "liger-kernel's Triton kernels need GPUs, but this run is on CPUs",
            key="model.liger",
            hint="set it to false",
        )
    elif _missing("liger-kernel", machine):
        yield Problem("liger-kernel is not installed", key="model.liger", hint=_INSTALL.format(package="liger-kernel"))


def _compile(job: Job, world: World, machine: MachineFacts) -> Iterator[Problem]:
    if not job.model.torch_compile:
        return
    if machine.compiler is None:
        yield Problem(
            "torch.compile needs a C++ compiler, but neither CXX, g++ nor clang++ is found here",
            key="model.torch_compile",
            hint="install g++ on every node, or set it to false",
        )
    if world.device == "cuda" and machine.gpus and _missing("triton", machine):
        yield Problem(
            "torch.compile needs triton on GPUs, but triton is not installed",
            key="model.torch_compile",
            hint="install the triton version of this torch, or set it to false",
        )


def _attention(job: Job, world: World, machine: MachineFacts) -> Iterator[Problem]:
    name = job.model.attn_implementation
    if name not in _FLASH:
        return
    hint = "remove it: auto uses PyTorch's sdpa"
    if world.device == "cpu":
        found = f"{name} needs GPUs, but this run is on CPUs"
        yield Problem(found, key="model.attn_implementation", hint=hint)
    elif machine.gpus and all(_missing(package, machine) for package in (_FLASH[name], "kernels")):
        found = f"{_FLASH[name]} is not installed"
        yield Problem(found, key="model.attn_implementation", hint=f"pip install {_FLASH[name]}, or {hint}")


def model_option_warnings(inputs: PlanInputs[Job]) -> Iterator[str]:
    """Warnings about options that have little or no effect."""
    job, user = inputs.job, inputs.ds_config
    if job.model.torch_compile and zero_stage(user) == 3:
        yield (
            "model.torch_compile under ZeRO-3: DeepSpeed's hooks gather each layer's weights between the compiled "
            "parts, and PyTorch does not compile some of them (recompile_limit in the rank's log). The result is "
            "the same, but there is little or no speedup; ZeRO-1 and 2 gain most."
        )
    if user.get("checkpoint.load_universal") is not None:
        yield (
            "checkpoint.load_universal in the DeepSpeed JSON is not used: the launcher turns it on for a checkpoint "
            "that it converted for another number of ranks, and off for all others."
        )


def sequence_parallel_problems(job: Job, model: ModelFacts) -> Iterator[Problem]:
    """Why ranks cannot share this model's sequences, if the job sets sequence_parallel_size."""
    size, queries, keys = job.model.sequence_parallel_size, model.attention_heads, model.key_value_heads
    if size == 1:
        return
    if not model.whole_attention or keys is None:
        yield _not_shared(
            f"Ulysses needs layers that all attend to all previous tokens, through transformers' attention interface; "
            f"{model.model_type} has other layers",
            "remove it; a lower data.max_length, gradient_checkpointing and ZeRO-3 save memory too",
        )
    elif queries % size or (keys % size and size % keys):
        yield _not_shared(
            f"{size} ranks cannot share {queries} attention heads and {keys} key-value heads evenly",
            f"use a divisor of {queries} that divides {keys} or is a multiple of it",
        )
    if model.router_loss_coefficient:
        yield _not_shared(
            "the routers' load-balancing loss needs whole sequences, but each rank would have a part",
            "remove it, or set output_router_logits: false in a copy of the model's config.json",
        )


def check_chunked_loss(inputs: PlanInputs[Job], model: ModelFacts) -> None:
    """Raises RequestError if the job sets chunked_loss: true, but the loss cannot be chunked."""
    if inputs.job.model.chunked_loss is True and (reason := whole_logits_reason(inputs, model)) is not None:
        hint = "remove it: auto computes the logits of all tokens here"
        raise RequestError(Problem(reason, key="model.chunked_loss", hint=hint))


def whole_logits_reason(inputs: PlanInputs[Job], model: ModelFacts) -> str | None:
    """Why the loss needs the logits of all tokens at once; None if it can be chunked."""
    section = inputs.job.model
    for option in ("liger", "torch_compile"):
        if getattr(section, option):
            return f"it cannot be combined with model.{option}"
    if inputs.precision == "fp16":
        return "in float16 its gradients would be computed before the loss is scaled, and small ones would become zero"
    if as_bool(inputs.ds_config.get("torch_autocast.enabled")):
        return "it cannot be combined with torch_autocast in the DeepSpeed JSON"
    if not model.chunked_loss:
        return (
            f"the logits of this {model.model_type} are not only the product of its output layer (a cap, a factor, an "
            "adapter or other code), or a small instance of the model could not be run"
        )
    return None


def _sequence_parallel(job: Job, user: DsConfig) -> Iterator[Problem]:
    """Options with which the gradients would be wrong, or are not tested."""
    if job.model.sequence_parallel_size == 1:
        return
    if job.model.attn_implementation == "eager":
        yield _not_shared("eager attention would compute the whole attention matrix", "use sdpa or flash attention")
    for option in ("liger", "torch_compile"):
        if getattr(job.model, option):
            yield _not_shared(f"it cannot be combined with model.{option}", "use one of the two")
    # These average gradients over other ranks than stage 3's reduce-scatter.
    for key, value in (("reduce_scatter", False), ("zero_quantized_gradients", True)):
        if zero_stage(user) == 3 and as_bool(user.get(f"zero_optimization.{key}")) is value:
            found = f"under ZeRO-3 it cannot be combined with zero_optimization.{key}: {str(value).lower()}"
            yield _not_shared(found, f"remove {key} from the DeepSpeed JSON")


def _not_shared(message: str, hint: str) -> Problem:
    return Problem(message, key="model.sequence_parallel_size", hint=hint)


def _missing(package: str, machine: MachineFacts) -> bool:
    return machine.versions.get(package, "missing") == "missing"
