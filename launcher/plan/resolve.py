"""Makes a plan from a job and measurements: the only place that decides the numbers of a run. Pure."""

from __future__ import annotations

from launcher.ds_config import Composed, compose, zero_stage
from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.batch import KEYS, BatchSizes, resolve_batch
from launcher.plan.conflicts import check_conflicts
from launcher.plan.data_warnings import data_warnings
from launcher.plan.decisions import decisions_of
from launcher.plan.evaluation import check_evaluation, checkpoint_warnings
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.fit import MemoryNeeds, memory_limits, memory_warnings
from launcher.plan.inputs import PlanInputs
from launcher.plan.learning_rate import decide_lr
from launcher.plan.length import check_token_ids, default_batch_limit, length_warnings, resolve_length
from launcher.plan.model_options import (
    check_chunked_loss,
    check_model_options,
    model_option_warnings,
    sequence_parallel_problems,
)
from launcher.plan.packing import check_packing, default_batch, grouping_warnings, packing_problems
from launcher.plan.schema import ConfigChange, Plan, Training
from launcher.version import __version__


def resolve(inputs: PlanInputs[Job], model: ModelFacts, data: DataFacts) -> Plan:
    """The plan of a training. Raises RequestError if job, JSON and measurements contradict each other."""
    job, user = inputs.job, inputs.ds_config
    check_model_options(inputs)
    check_packing(inputs)
    check_chunked_loss(inputs, model)
    check_model(job, model)
    check_token_ids(data, model)
    needs = MemoryNeeds(inputs, model, longest_row(job, data))
    batch = training_batch(needs, data)
    length = resolve_length(job, data, batch.train_batch_size, *_deciding_key(inputs, batch))
    check_evaluation(job, length.total_updates)
    decided = decide_lr(inputs, model, data, length)
    composed = compose(
        user,
        decisions_of(
            inputs,
            batch,
            optimizer_lr=decided.optimizer_lr,
            scheduler=decided.scheduler,
            hidden_size=model.hidden_size,
            sequence_parallel_size=inputs.world.sequence_parallel_size,
            explicit=inputs.explicit,
            total_num_steps=length.total_updates,
            warmup_num_steps=decided.learning_rate.warmup_updates,
        ),
    )
    micro = batch.train_micro_batch_size_per_gpu
    return Plan(
        launcher=__version__,
        workload=Training(
            job=job,
            model=model,
            data=data,
            memory=needs.estimate(micro).to_dict(),
            chunked_loss=needs.chunked_loss(micro),
            background_copy_bytes=needs.background_copy_bytes(micro),
        ),
        machine=inputs.machine,
        world=inputs.world,
        precision=inputs.precision,
        zero_stage=zero_stage(user),
        train_batch_size=batch.train_batch_size,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        length=length,
        learning_rate=decided.learning_rate,
        ds_config=composed.config,
        ds_config_changes=changes_of(composed),
        warnings=(
            *model.notes,
            *length_warnings(job, data, batch.train_batch_size, length),
            *grouping_warnings(job, batch.train_batch_size, micro),
            *data_warnings(job, data),
            *memory_warnings(needs, micro),
            *checkpoint_warnings(job, length),
            *needs.background_warnings(micro),
            *model_option_warnings(inputs),
        ),
    )


def changes_of(composed: Composed) -> tuple[ConfigChange, ...]:
    """The changes to the user's JSON, as the plan stores them."""
    return tuple(
        ConfigChange(key=change.key_path, before=change.before, after=change.after, reason=change.reason)
        for change in composed.changes
    )


def check_inputs(inputs: PlanInputs[Job]) -> None:
    """Raises RequestError for contradictions that can be found without measuring model and data."""
    check_model_options(inputs)
    check_packing(inputs)
    zero_stage(inputs.ds_config)
    batch = resolve_batch(inputs.given_batch, inputs.world.data_parallel_size, lambda _: True)
    check_conflicts(inputs, batch)
    check_evaluation(inputs.job, inputs.job.train.max_steps)


def check_model(job: Job, model: ModelFacts) -> None:
    """Raises RequestError with everything in the job that the model does not support."""
    problems = []
    if model.max_positions is not None and job.data.max_length > model.max_positions:
        problems.append(
            Problem(
                f"{job.data.max_length} is more than the {model.max_positions} positions of this model",
                key="data.max_length",
                hint=f"use at most {model.max_positions}",
            )
        )
    if job.model.gradient_checkpointing and not model.supports_gradient_checkpointing:
        problems.append(
            Problem(
                f"{model.model_type} does not support it",
                key="model.gradient_checkpointing",
                hint="set it to false",
            )
        )
    problems += sequence_parallel_problems(job, model)
    problems += packing_problems(job, model)
    if job.data.format == "messages" and not model.has_chat_template and job.data.chat_template is None:
        problems.append(
            Problem(
                "this model's tokenizer has no chat template",
                key="data.format",
                hint="use the model's instruct version, set data.chat_template, or use prompt-completion rows",
            )
        )
    if problems:
        raise RequestError(*problems)


def training_batch(needs: MemoryNeeds, data: DataFacts) -> BatchSizes:
    """The batch sizes of a training. A micro-batch that is not given is the largest that fits in memory."""
    inputs = needs.inputs
    limits = memory_limits(inputs.world, inputs.machine)
    return resolve_batch(
        inputs.given_batch,
        inputs.world.data_parallel_size,
        lambda micro: limits.allow(needs, micro),
        default_batch_limit(inputs.job, data),
        default_batch(inputs.job, data),
    )


def _deciding_key(inputs: PlanInputs[Job], batch: BatchSizes) -> tuple[Problem | None, int]:
    """The location of the key that decided the batch, and the batch divided by that key's value.

    (None, 1) if no key sets one, or if the batch is one sequence per rank, the smallest possible.
    """
    given, job = inputs.given_batch, inputs.job
    name = next((key for key in KEYS if key in given), None)
    if name is None or batch.train_batch_size == inputs.world.data_parallel_size:
        return None, 1
    if job.train.tokens_per_batch is not None:
        return Problem("", key="train.tokens_per_batch"), 1
    in_job = getattr(job.train, name) != "auto"
    location = Problem("", key=f"train.{name}") if in_job else inputs.ds_config.problem(name, "")
    return location, batch.train_batch_size // given[name]


def longest_row(job: Job, data: DataFacts) -> int:
    """Tokens of the longest training or evaluation sequence, or of a bin."""
    training = job.data.max_length if job.data.packing else data.train.longest
    return max(training, data.eval.longest if data.eval else 0)
