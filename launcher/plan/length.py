"""How many updates a run has, and which samples they take."""

from __future__ import annotations

import math
from dataclasses import replace

from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.schema import Length

_BATCH_OF_THE_JOB = Problem("", key="train.train_batch_size")


def open_batch_limit(job: Job, data: DataFacts) -> int:
    """The most sequences that a batch has which nobody gave: those of the data, and of the run if they are fewer."""
    return data.train.sequences if job.train.max_steps else min(data.train.sequences, _wanted(job, data))


def resolve_length(
    job: Job, data: DataFacts, batch: int, given: Problem | None = _BATCH_OF_THE_JOB, factor: int = 1
) -> Length:
    """Updates in all. Epochs follow each other without a gap; only the run's last update may need filling up.

    `given` is the place of the key that decided the batch, which is that key's value times `factor`; None if the batch
    is the launcher's choice. Raises RequestError if epochs or samples are less than a batch that somebody gave.
    """
    sequences = data.train.sequences
    if job.train.max_steps is not None:
        updates, refilled = job.train.max_steps, 0
    else:
        wanted = _wanted(job, data)
        if wanted < batch and given is not None:
            raise RequestError(_too_few(job, wanted, batch, given, factor))
        updates = math.ceil(wanted / batch)
        refilled = updates * batch - wanted
    return Length(
        total_updates=updates,
        updates_per_epoch=sequences / batch,
        samples=updates * batch,
        tokens_per_update=data.train.tokens / sequences * batch,
        refilled_samples=refilled,
    )


def _wanted(job: Job, data: DataFacts) -> int:
    """Samples that epochs or total_samples ask for."""
    return job.train.total_samples or max(1, round(data.train.sequences * (job.train.num_train_epochs or 1.0)))


def _too_few(job: Job, wanted: int, batch: int, given: Problem, factor: int) -> Problem:
    more = "samples" if job.train.total_samples else "epochs"
    most = wanted // factor
    hint = f"at most {most}, or more {more}" if most else f"leave it out; or more {more}, or fewer ranks"
    return replace(given, message=f"{wanted} sequences in all are less than one batch of {batch}", hint=hint)


def length_warnings(job: Job, data: DataFacts, batch: int, length: Length) -> list[str]:
    """What a user should know about the samples that the run takes."""
    told = []
    if length.refilled_samples:
        told.append(
            f"the last update is filled up with {length.refilled_samples} samples"
            + (
                " beyond train.total_samples"
                if job.train.total_samples
                else " of a further epoch, so that none is dropped"
            )
        )
    if batch > data.train.sequences:
        told.append(f"a batch of {batch} takes some of the {data.train.sequences} training sequences more than once")
    if data.train.cut:
        told.append(f"{data.train.cut} of {data.train.rows} rows are cut at {job.data.max_length} tokens")
    if data.train.dropped:
        told.append(
            f"{data.train.dropped} of {data.train.rows} rows leave nothing to learn and are left out"
            f"{_because(data.train.dropped_because)}"
        )
    if data.train.partly_learned:
        told.append(
            f"in {data.train.partly_learned} conversations some assistant turns are not learned: they are not found in "
            f"what the chat template writes"
        )
    told += data.train.notes
    if data.eval is not None:
        told += [f"data.eval: {note}" for note in data.eval.notes if note not in data.train.notes]
    return told


def _because(reasons: dict[str, int]) -> str:
    return f": {', '.join(f'{number} {reason}' for reason, number in reasons.items())}" if reasons else ""


def check_token_ids(data: DataFacts, model: ModelFacts) -> None:
    """Does the model have an embedding for every token of the data? Raises RequestError."""
    largest = max(split.largest_token for split in (data.train, data.eval) if split is not None)
    if largest >= model.vocab_size:
        raise RequestError(
            Problem(
                f"the tokenizer writes token {largest}, and the model has {model.vocab_size} embeddings "
                f"(0 to {model.vocab_size - 1})",
                key="model.name_or_path",
                hint="take the tokenizer that belongs to the model, or a model whose embeddings were resized to it",
            )
        )
