"""Packed sequences (data.packing): what they count, and when they cannot be used. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, Job
from launcher.plan.batch import KEYS, TARGET_BATCH
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.inputs import PlanInputs

_KEY, _TOKENS = "data.packing", "train.tokens_per_batch"
_LOW = 0.9
"""Bins that are less full are worth a warning."""


def samples_per_epoch(job: Job, data: DataFacts) -> int:
    """What batches, epochs and samples count: the bins of the training data if it is packed, else its sequences."""
    return data.train.bins if job.data.packing else data.train.sequences


def sample_name(job: Job) -> str:
    """The word for what `samples_per_epoch` counts, in the plural."""
    return "bins" if job.data.packing else "sequences"


def fullness(job: Job, data: DataFacts) -> float:
    """The part of the bins' tokens that sequences fill."""
    return data.train.tokens / (data.train.bins * job.data.max_length)


def default_batch(job: Job, data: DataFacts) -> int:
    """A batch that is not given. In bins, it has about as many sequences as one without packing."""
    if not job.data.packing:
        return TARGET_BATCH
    return min(TARGET_BATCH, max(1, round(TARGET_BATCH * data.train.bins / data.train.sequences)))


def check_packing(inputs: PlanInputs[AnyJob]) -> None:
    """Raises RequestError for options that packing cannot be combined with, and for an unusable tokens_per_batch."""
    problems = [*_with_options(inputs.job), *_tokens_per_batch(inputs)]
    if problems:
        raise RequestError(*problems)


def _with_options(job: AnyJob) -> Iterator[Problem]:
    if not isinstance(job, Job) or not job.data.packing:
        return
    if job.data.group_by_length:
        found = "packed sequences are not padded, so grouping them by length has no effect"
        yield Problem(found, key="data.group_by_length", hint="remove it")
    if job.model.sequence_parallel_size > 1:
        found = "it cannot be combined with model.sequence_parallel_size: ranks would have parts of the bins"
        yield Problem(found, key=_KEY, hint="use one of the two; gradient_checkpointing and ZeRO-3 save memory too")
    for option, reason in (
        ("liger", "its kernels are not tested with packed sequences"),
        ("torch_compile", "the model would be compiled again for almost every bin"),
    ):
        if getattr(job.model, option):
            yield Problem(f"it cannot be combined with model.{option}: {reason}", key=_KEY, hint="use one of the two")


def _tokens_per_batch(inputs: PlanInputs[AnyJob]) -> Iterator[Problem]:
    job, tokens = inputs.job, inputs.job.train.tokens_per_batch
    if tokens is None:
        return
    if not isinstance(job, Job) or not job.data.packing:
        hint = "set data.packing: true, or use train.train_batch_size"
        yield Problem("a batch can only be given in tokens if sequences are packed", key=_TOKENS, hint=hint)
        return
    batch, micro, accumulation = KEYS
    given = inputs.given_batch_without_tokens
    if batch in given:
        yield Problem(f"{batch} is {given[batch]}: only one of the two can be set", key=_TOKENS, hint="remove one")
    elif micro in given and accumulation in given:
        found = f"{micro} and {accumulation} are set too, and with the number of ranks they already give the batch"
        yield Problem(found, key=_TOKENS, hint="remove one of the three")
    elif inputs.given_batch[batch] == 0:
        least = inputs.bins_per_step * job.data.max_length
        found = (
            f"{tokens} tokens are fewer than {inputs.bins_per_step} bins of {job.data.max_length}, the smallest batch"
        )
        yield Problem(found, key=_TOKENS, hint=f"use at least {least}, a shorter data.max_length or fewer ranks")


def packing_problems(job: Job, model: ModelFacts) -> Iterator[Problem]:
    """Why this model's sequences cannot be packed, if the job asks for it."""
    if not job.data.packing:
        return
    wanted = job.model.attn_implementation
    implementation = "sdpa" if wanted == "auto" else wanted
    if not model.packed_attention:
        found = (
            f"a small instance of this {model.model_type} could not be run with packed sequences, or computed "
            "something else than for each sequence alone, as models do that have other layers than plain attention"
        )
        yield Problem(found, key=_KEY, hint="remove it: sequences are then padded")
    elif implementation not in model.packed_attention:
        found = f"with model.attn_implementation {wanted} packed sequences would attend to each other"
        usable = " or ".join(("auto", *model.packed_attention))
        yield Problem(found, key=_KEY, hint=f"set model.attn_implementation to {usable}")
    if model.router_loss_coefficient is not None:
        yield Problem(
            "the balance loss of the experts' routers depends on which sequences share a micro-batch, so it would not "
            "be that of the unpacked sequences",
            key=_KEY,
            hint="remove it, or set output_router_logits: false in a copy of the model's config.json",
        )


def packing_warnings(job: Job, data: DataFacts) -> Iterator[str]:
    """A warning if the bins stay partly empty."""
    if job.data.packing and fullness(job, data) < _LOW:
        yield (
            f"the bins are only {fullness(job, data):.0%} full, because few sequences are short enough for the rest of "
            f"a bin; a longer data.max_length fills them better"
        )


def grouping_warnings(job: Job, batch: int, micro_batch: int) -> Iterator[str]:
    """A warning if an update has a single micro-batch, so that its sequences cannot be grouped."""
    if job.data.group_by_length and batch == micro_batch:
        yield (
            "data.group_by_length has no effect: an update has a single micro-batch; a smaller "
            "train.train_micro_batch_size_per_gpu makes more"
        )
