"""What a model's switches need of the machine: told before anything is started."""

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
"""The package of each; without it transformers takes the one of `kernels`."""
_INSTALL = "pip install {package} in the launcher's environment, on every node"


def check_model_options(inputs: PlanInputs[Job]) -> None:
    """Raises RequestError with every option of the model section that does not work here, or not with another one."""
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
            "liger-kernel's kernels are Triton's and need GPUs; this run is on CPUs",
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
            "torch.compile builds its code with a C++ compiler, and neither CXX, g++ nor clang++ is found here",
            key="model.torch_compile",
            hint="install g++ on every node, or set it to false",
        )
    if world.device == "cuda" and machine.gpus and _missing("triton", machine):
        yield Problem(
            "torch.compile makes Triton kernels on GPUs, and triton is not installed",
            key="model.torch_compile",
            hint="install the triton that belongs to this torch, or set it to false",
        )


def _attention(job: Job, world: World, machine: MachineFacts) -> Iterator[Problem]:
    asked = job.model.attn_implementation
    if asked not in _FLASH:
        return
    hint = "leave it out: auto takes PyTorch's sdpa"
    if world.device == "cpu":
        found = f"{asked} needs GPUs, and this run is on CPUs"
        yield Problem(found, key="model.attn_implementation", hint=hint)
    elif machine.gpus and all(_missing(package, machine) for package in (_FLASH[asked], "kernels")):
        found = f"{_FLASH[asked]} is not installed"
        yield Problem(found, key="model.attn_implementation", hint=f"pip install {_FLASH[asked]}, or {hint}")


def model_option_warnings(inputs: PlanInputs[Job]) -> Iterator[str]:
    """Options that work without the effect that they are set for."""
    job, user = inputs.job, inputs.ds_config
    if job.model.torch_compile and zero_stage(user) == 3:
        yield (
            "model.torch_compile under ZeRO-3: DeepSpeed's hooks gather each layer's weights between the compiled "
            "parts, and PyTorch gives up on some of them (recompile_limit in the rank's log): the result is "
            "the same, the gain small or none. It does most under ZeRO-1 and 2."
        )
    if user.get("checkpoint.load_universal") is not None:
        yield (
            "checkpoint.load_universal in the DeepSpeed JSON is not used: the launcher switches it on where it has "
            "converted a checkpoint for another number of ranks, and off for all others."
        )


def sequence_parallel_problems(job: Job, model: ModelFacts) -> Iterator[Problem]:
    """Why ranks cannot share this model's sequences, where the job asks for it."""
    size, queries, keys = job.model.sequence_parallel_size, model.attention_heads, model.key_value_heads
    if size == 1:
        return
    if not model.whole_attention or keys is None:
        yield _not_shared(
            f"Ulysses needs layers that all attend to everything before, which {model.model_type} has not, or not in "
            "the way that it can exchange",
            "leave it out; a lower data.max_length, gradient_checkpointing and ZeRO-3 save memory too",
        )
    elif queries % size or (keys % size and size % keys):
        yield _not_shared(
            f"{size} ranks cannot share {queries} attention heads with {keys} for keys and values evenly",
            f"a divisor of {queries} that divides {keys} or is a multiple of it",
        )
    if model.router_loss_coefficient:
        yield _not_shared(
            "the balance loss of the experts' routers is over whole sequences, of which each rank would have a part",
            "leave it out, or set output_router_logits: false in a copy of the model's config.json",
        )


def _sequence_parallel(job: Job, user: DsConfig) -> Iterator[Problem]:
    """What would make wrong gradients, or has not been shown to make right ones."""
    if job.model.sequence_parallel_size == 1:
        return
    if job.model.attn_implementation == "eager":
        yield _not_shared("eager attention would write the whole attention matrix", "take sdpa or a flash attention")
    for switch in ("liger", "torch_compile"):
        if getattr(job.model, switch):
            yield _not_shared(f"it does not go together with model.{switch}", "choose one of the two")
    # Their gradients are averaged over other ranks than those of stage 3's reduce-scatter.
    for key, value in (("reduce_scatter", False), ("zero_quantized_gradients", True)):
        if zero_stage(user) == 3 and as_bool(user.get(f"zero_optimization.{key}")) is value:
            found = f"under ZeRO-3 it does not go together with zero_optimization.{key}: {str(value).lower()}"
            yield _not_shared(found, f"take {key} out of the DeepSpeed JSON")


def _not_shared(message: str, hint: str) -> Problem:
    return Problem(message, key="model.sequence_parallel_size", hint=hint)


def _missing(package: str, machine: MachineFacts) -> bool:
    return machine.versions.get(package, "missing") == "missing"
