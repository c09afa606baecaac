"""The number of updates of a run, and its samples."""

from __future__ import annotations

import math
from dataclasses import replace

from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.job.schema import MOST_UPDATES
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.packing import packing_warnings, sample_name, samples_per_epoch
from launcher.plan.schema import Length

_BATCH_OF_THE_JOB = Problem("", key="train.train_batch_size")


def default_batch_limit(job: Job, data: DataFacts) -> int:
    """The maximum of a batch that is not given: the samples of the data, or of the run if they are fewer."""
    samples = samples_per_epoch(job, data)
    return samples if job.train.max_steps else min(samples, _requested(job, data))


def resolve_length(
    job: Job, data: DataFacts, batch: int, given: Problem | None = _BATCH_OF_THE_JOB, factor: int = 1
) -> Length:
    """The length of the run. Epochs are concatenated; only the last update of the run may have to be filled up.

    `given` is the location of the key that decided the batch, which is that key's value times `factor`; None if the
    launcher chose the batch. Raises RequestError if the run has fewer samples than a batch that was given.
    """
    samples = samples_per_epoch(job, data)
    if job.train.max_steps is not None:
        updates, refilled = job.train.max_steps, 0
    else:
        requested = _requested(job, data)
        if requested < batch and given is not None:
            raise RequestError(_too_few(job, requested, batch, given, factor))
        updates = math.ceil(requested / batch)
        check_updates(updates, "total_samples" if job.train.total_samples else "num_train_epochs")
        refilled = updates * batch - requested
    return Length(
        total_updates=updates,
        updates_per_epoch=samples / batch,
        samples=updates * batch,
        tokens_per_update=data.train.tokens / samples * batch,
        refilled_samples=refilled,
    )


def check_updates(updates: int, key: str) -> None:
    """Raises RequestError if a run has too many updates to be planned, because of the key `key` of `train`."""
    if updates > MOST_UPDATES:
        found = f"the run has {updates:,} updates, more than {MOST_UPDATES:,}"
        raise RequestError(Problem(found, key=f"train.{key}", hint="make it smaller, or use a larger batch"))


def _requested(job: Job, data: DataFacts) -> int:
    """Samples of the requested epochs, or total_samples."""
    return job.train.total_samples or max(1, round(samples_per_epoch(job, data) * (job.train.num_train_epochs or 1.0)))


def _too_few(job: Job, requested: int, batch: int, given: Problem, factor: int) -> Problem:
    more = "samples" if job.train.total_samples else "epochs"
    most = requested // factor
    if given.key == "train.tokens_per_batch":
        hint = f"use at most {requested * job.data.max_length}, or more {more}"
    else:
        hint = f"use at most {most}, or more {more}" if most else f"remove it, or use more {more} or fewer ranks"
    found = f"the run has {requested} {sample_name(job)}, fewer than one batch of {batch}"
    return replace(given, message=found, hint=hint)


def length_warnings(job: Job, data: DataFacts, batch: int, length: Length) -> list[str]:
    """Warnings about the samples of the run."""
    warnings = []
    if length.refilled_samples:
        warnings.append(
            f"the last update is filled up with {length.refilled_samples} samples"
            + (
                " beyond train.total_samples"
                if job.train.total_samples
                else " of another epoch, so that no sample is dropped"
            )
        )
    if batch > (samples := samples_per_epoch(job, data)):
        warnings.append(f"a batch of {batch} contains some of the {samples} training {sample_name(job)} twice or more")
    warnings += packing_warnings(job, data)
    if data.train.cut:
        warnings.append(f"{data.train.cut} of {data.train.rows} rows are cut at {job.data.max_length} tokens")
    if data.train.dropped:
        warnings.append(
            f"{data.train.dropped} of {data.train.rows} rows have nothing to learn and are skipped"
            f"{_because(data.train.dropped_because)}"
        )
    if data.train.partly_learned:
        warnings.append(
            f"in {data.train.partly_learned} conversations some assistant turns are not learned: they are not in the "
            f"output of the chat template"
        )
    warnings += data.train.notes
    if data.eval is not None:
        warnings += [f"data.eval: {note}" for note in data.eval.notes if note not in data.train.notes]
    return warnings


def _because(reasons: dict[str, int]) -> str:
    return f": {', '.join(f'{number} {reason}' for reason, number in reasons.items())}" if reasons else ""


def check_token_ids(data: DataFacts, model: ModelFacts) -> None:
    """Raises RequestError if the data has a token for which the model has no embedding."""
    largest = max(split.largest_token for split in (data.train, data.eval) if split is not None)
    if largest >= model.vocab_size:
        raise RequestError(
            Problem(
                f"the data has token {largest}, but the model has {model.vocab_size} embeddings "
                f"(0 to {model.vocab_size - 1})",
                key="model.name_or_path",
                hint="use the tokenizer that belongs to the model, or a model whose embeddings were resized to it",
            )
        )
