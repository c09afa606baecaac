"""From a job and what was measured to a plan: pure, and the only place where a run's numbers are decided."""

from __future__ import annotations

from launcher.ds_config import Composed, DsConfig, batch_keys, compose, precision_of, zero_stage
from launcher.ds_config.facts import Precision
from launcher.errors import Problem, RequestError
from launcher.job import Job, explicit_keys
from launcher.plan.batch import KEYS, BatchSizes, resolve_batch
from launcher.plan.conflicts import check_conflicts
from launcher.plan.data_warnings import data_warnings
from launcher.plan.decisions import decisions_of
from launcher.plan.facts import DataFacts, MachineFacts, ModelFacts
from launcher.plan.fit import Needs, memory_warnings, room_of
from launcher.plan.learning_rate import decide_rate
from launcher.plan.length import check_token_ids, length_warnings, open_batch_limit, resolve_length
from launcher.plan.model_options import check_switches, sequence_parallel_problems, switch_warnings
from launcher.plan.schema import Change, Length, Plan, World
from launcher.version import __version__

_PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def resolve(job: Job, user: DsConfig, model: ModelFacts, data: DataFacts, machine: MachineFacts) -> Plan:
    """The plan of `job`, whose DeepSpeed JSON is `user`. Raises RequestError for every contradiction."""
    world = resolve_world(job, machine)
    check_switches(job, user, world, machine)
    check_model(job, model)
    check_token_ids(data, model)
    precision = resolve_precision(job, user, world, machine)
    batch = _batch(job, user, world, model, machine, precision, data)
    length = resolve_length(job, data, batch.train_batch_size, *_what_decided(job, user, world, batch))
    _check_eval_every(job, length.total_updates)
    rate = decide_rate(job, model, data, length, user)
    composed = compose(
        user,
        decisions_of(
            job,
            world,
            precision,
            batch,
            optimizer_lr=rate.optimizer_lr,
            scheduler=rate.scheduler,
            hidden_size=model.hidden_size,
            sequence_parallel_size=world.sequence_parallel_size,
            explicit=explicit_keys(job),
            total_num_steps=length.total_updates,
            warmup_num_steps=rate.learning_rate.warmup_updates,
        ),
    )
    needs = Needs(job, user, model, world, precision, longest_sequence(data))
    return Plan(
        launcher=__version__,
        job=job,
        model=model,
        data=data,
        machine=machine,
        world=world,
        precision=precision,
        zero_stage=zero_stage(user),
        train_batch_size=batch.train_batch_size,
        train_micro_batch_size_per_gpu=batch.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        length=length,
        learning_rate=rate.learning_rate,
        ds_config=composed.config,
        ds_config_changes=changes_of(composed),
        memory=needs.estimate(batch.train_micro_batch_size_per_gpu).to_dict(),
        warnings=(
            *model.notes,
            *length_warnings(job, data, batch.train_batch_size, length),
            *data_warnings(job, data),
            *memory_warnings(needs, batch.train_micro_batch_size_per_gpu, machine),
            *_rhythm_warnings(job, length),
            *switch_warnings(job, user),
        ),
    )


def changes_of(composed: Composed) -> tuple[Change, ...]:
    """What was done to the user's JSON, as the plan keeps it."""
    return tuple(
        Change(key=change.key_path, before=change.before, after=change.after, reason=change.reason)
        for change in composed.changes
    )


def check_request(job: Job, user: DsConfig, machine: MachineFacts) -> None:
    """The contradictions that need neither model nor data: told before any time is spent. Raises RequestError."""
    world = resolve_world(job, machine)
    check_switches(job, user, world, machine)
    precision = resolve_precision(job, user, world, machine)
    zero_stage(user)
    batch = resolve_batch(given_batch(job, user), world.data_parallel_size, lambda _: True)
    check_conflicts(job, user, world, precision, batch)
    _check_eval_every(job, job.train.max_steps)


def resolve_world(job: Job, machine: MachineFacts) -> World:
    """Ranks and their device. GPUs asked for by number are believed: the plan may be made on a login node."""
    cluster = job.cluster
    gpus = machine.gpus if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    asked = cluster.processes_per_node
    if gpus and cluster.gpus_per_node != "auto" and asked not in ("auto", gpus):
        raise RequestError(
            Problem(
                f"{asked} processes and {gpus} GPUs a node: there is one rank a GPU",
                key="cluster.processes_per_node",
                hint="leave it out where there are GPUs",
            )
        )
    processes = gpus or (1 if asked == "auto" else asked)
    shared = job.model.sequence_parallel_size if job.model else 1
    if cluster.nodes * processes % shared:
        raise RequestError(
            Problem(
                f"{cluster.nodes * processes} ranks cannot be divided into groups of {shared}",
                key="model.sequence_parallel_size",
                hint="a divisor of the number of ranks",
            )
        )
    return World(
        nodes=cluster.nodes,
        processes_per_node=processes,
        device="cuda" if gpus else "cpu",
        backend="nccl" if gpus else "gloo",
        threads_per_process=min(max(1, machine.cpus // processes), 8 if gpus else machine.cpus),
        sequence_parallel_size=shared,
    )


def resolve_precision(job: Job, user: DsConfig, world: World, machine: MachineFacts) -> Precision:
    """What the job asks for, else what the JSON fixes, else the best that the hardware has."""
    if job.model.dtype != "auto":
        return _PRECISIONS[job.model.dtype]
    return precision_without_model(user, world, machine)


def precision_without_model(user: DsConfig, world: World, machine: MachineFacts) -> Precision:
    """What the JSON fixes, else the best that the hardware has."""
    fixed = precision_of(user)
    if fixed is not None:
        return fixed
    if world.device == "cpu":
        return "fp32"
    return "bf16" if machine.bf16 or not machine.gpus else "fp16"


def check_model(job: Job, model: ModelFacts) -> None:
    """Does the model do what the job asks of it? Raises RequestError."""
    problems = []
    if model.max_positions is not None and job.data.max_length > model.max_positions:
        problems.append(
            Problem(
                f"{job.data.max_length} is more than the {model.max_positions} positions of this model",
                key="data.max_length",
                hint=f"at most {model.max_positions}",
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
    if job.data.format == "messages" and not model.has_chat_template and job.data.chat_template is None:
        problems.append(
            Problem(
                "this model's tokenizer has no chat template",
                key="data.format",
                hint="take the model's instruct version, set data.chat_template, or take prompt-completion rows",
            )
        )
    if problems:
        raise RequestError(*problems)


def given_batch(job: Job, user: DsConfig) -> dict[str, int]:
    asked = {key: getattr(job.train, key) for key in KEYS if getattr(job.train, key) != "auto"}
    return {**batch_keys(user), **asked}


def _batch(
    job: Job,
    user: DsConfig,
    world: World,
    model: ModelFacts,
    machine: MachineFacts,
    precision: Precision,
    data: DataFacts,
) -> BatchSizes:
    needs = Needs(job, user, model, world, precision, longest_sequence(data))
    room = room_of(world, machine)
    return resolve_batch(
        given_batch(job, user),
        world.data_parallel_size,
        lambda micro: room.holds(needs, micro),
        open_batch_limit(job, data),
    )


def _what_decided(job: Job, user: DsConfig, world: World, batch: BatchSizes) -> tuple[Problem | None, int]:
    """The place of the key that decided the batch, and the batch divided by that key's value.

    (None, 1) if nobody gave one, or if the batch is one sequence per rank, which is the least there can be.
    """
    given = given_batch(job, user)
    name = next((key for key in KEYS if key in given), None)
    if name is None or batch.train_batch_size == world.data_parallel_size:
        return None, 1
    in_job = getattr(job.train, name) != "auto"
    place = Problem("", key=f"train.{name}") if in_job else user.problem(name, "")
    return place, batch.train_batch_size // given[name]


def longest_sequence(data: DataFacts) -> int:
    """Tokens of the longest sequence, learned from or evaluated on."""
    return max(data.train.longest, data.eval.longest if data.eval else 0)


def _check_eval_every(job: Job, total_updates: int | None) -> None:
    """Raises RequestError where there is nothing to evaluate on, or never a time for it in a run that long."""
    every = job.train.eval_every
    if every is not None and total_updates is not None and every > total_updates:
        raise RequestError(
            Problem(
                f"{every} is beyond the run, which has {total_updates} updates",
                key="train.eval_every",
                hint=f"at most {total_updates}, or leave it out: the start and the end are always evaluated",
            )
        )
    if every is not None and job.data.eval is None:
        raise RequestError(
            Problem("there is nothing to evaluate on", key="train.eval_every", hint="give data.eval, or leave it out")
        )


def _rhythm_warnings(job: Job, length: Length) -> list[str]:
    every = job.checkpoint.every
    if every is not None and every > length.total_updates:
        return [f"checkpoint.every {every} is beyond the run's {length.total_updates} updates: only the end is saved"]
    return []
