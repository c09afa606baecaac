"""Checks of the keys that depend on evaluations: when to evaluate, to stop early, and what to keep and export. Pure."""

from __future__ import annotations

import math

from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.schema import Length


def check_evaluation(job: Job, total_updates: int | None) -> None:
    """Raises RequestError if a key needs evaluations or checkpoints that the run does not make."""
    every = job.train.eval_every
    if every is not None and total_updates is not None and every > total_updates:
        raise RequestError(
            Problem(
                f"{every} is more than the run's {total_updates} updates",
                key="train.eval_every",
                hint=f"use at most {total_updates}, or remove it: the run always evaluates at its start and end",
            )
        )
    if job.data.eval is None:
        for key, given in (
            ("train.eval_every", every is not None),
            ("checkpoint.keep_best", job.checkpoint.keep_best is not None),
            ("train.early_stopping", job.train.early_stopping is not None),
        ):
            if given:
                raise RequestError(
                    Problem("the job has no evaluation data", key=key, hint="set data.eval, or remove it")
                )
    if job.train.early_stopping is not None and every is None:
        found = "the run evaluates only before the first and after the last update"
        raise RequestError(Problem(found, key="train.early_stopping", hint="set train.eval_every, or remove it"))
    if job.export == "best":
        _check_best_export(job, total_updates)


def _check_best_export(job: Job, total_updates: int | None) -> None:
    """Raises RequestError if no checkpoint before the last one would have an evaluation loss, or would be kept."""

    def refused(found: str, hint: str) -> RequestError:
        return RequestError(Problem(found, key="export", hint=f"{hint}, or export: last"))

    if job.data.eval is None:
        raise refused("the job has no evaluation data, so no checkpoint is the best", "set data.eval")
    if job.train.eval_every is None:
        raise refused("the run evaluates only before the first and after the last update", "set train.eval_every")
    if job.checkpoint.keep_best is None:
        raise refused("the best checkpoint is not kept", "set checkpoint.keep_best=1")
    first = _first_evaluated_checkpoint(job)
    if first is None:
        raise refused("the run saves no checkpoints at evaluations", "set checkpoint.every as train.eval_every")
    if total_updates is not None and first >= total_updates:
        found = f"no checkpoint before the last of {total_updates} updates is saved at an evaluation"
        raise refused(found, "set checkpoint.every and train.eval_every to the same, smaller number")


def _first_evaluated_checkpoint(job: Job) -> int | None:
    """The first update after which the run evaluates and saves a checkpoint; None if no such update exists."""
    eval_every, section = job.train.eval_every, job.checkpoint
    if eval_every is None:
        return None
    return min((math.lcm(eval_every, n) for n in (section.every, section.keep_every) if n is not None), default=None)


def checkpoint_warnings(job: Job, length: Length) -> list[str]:
    """What the user should know about when the run saves, evaluates, stops early and exports."""
    every, found = job.checkpoint.every, []
    if every is not None and every > length.total_updates:
        found.append(
            f"checkpoint.every {every} is more than the run's {length.total_updates} updates: only the end is saved"
        )
    if every is not None and job.checkpoint.keep == 1:
        found.append("checkpoint.keep is 1: if that checkpoint is damaged, the run cannot be resumed; 2 is safer")
    if job.checkpoint.keep_best is not None and not _evaluates_each_checkpoint(job):
        found.append(
            "checkpoint.keep_best only compares checkpoints that were evaluated at the same update: make "
            "checkpoint.every a multiple of train.eval_every"
        )
    if job.export == "best" and (
        _first_evaluated_checkpoint(job) != job.train.eval_every or not job.checkpoint.save_final
    ):
        found.append(
            "export: best only chooses among checkpoints, and not every evaluation has one: make train.eval_every a "
            "multiple of checkpoint.every, and keep checkpoint.save_final"
        )
    return [*found, *_early_stopping_warnings(job, length)]


def _early_stopping_warnings(job: Job, length: Length) -> list[str]:
    section, every, found = job.train.early_stopping, job.train.eval_every, []
    if section is None or every is None:
        return []
    if section.patience > (evaluations := (length.total_updates - 1) // every):
        found.append(
            f"train.early_stopping.patience {section.patience} is more than the {evaluations} evaluations between the "
            "first and the last update: the run cannot end early"
        )
    if job.export in (True, "last"):
        found.append(
            "at an early stop the last weights are not the best ones: export: best exports the checkpoint with the "
            "lowest evaluation loss"
        )
    return found


def _evaluates_each_checkpoint(job: Job) -> bool:
    every, eval_every = job.checkpoint.every, job.train.eval_every
    return every is not None and eval_every is not None and every % eval_every == 0
