"""The plan of a user's script: its world, batch, length, learning rate and DeepSpeed JSON. Pure."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.ds_config import (
    Change,
    Composed,
    DsConfig,
    auto_scheduler,
    compose,
    optimizer_of,
    scheduler_of,
    zero_stage,
)
from launcher.ds_config.compose import BUCKET_SIZES
from launcher.errors import Problem, RequestError
from launcher.job import ScriptJob
from launcher.plan.batch import KEYS, BatchSizes, resolve_batch
from launcher.plan.decisions import decisions_of
from launcher.plan.facts import ModelFacts
from launcher.plan.inputs import PlanInputs
from launcher.plan.learning_rate import LearningRateDecision, decide_schedule
from launcher.plan.length import check_updates
from launcher.plan.packing import check_packing
from launcher.plan.resolve import changes_of
from launcher.plan.schema import ChoiceReason, LearningRate, Length, Plan, Script
from launcher.plan.situation import situation_of
from launcher.schedule.curve import DEEPSPEED_TYPES
from launcher.schedule.deepspeed_schedulers import replica
from launcher.schedule.safety import deepspeed_warnings
from launcher.version import __version__

_UNUSED = (
    *("data.", "checkpoint.", "export", "train.eval_every", "train.early_stopping", "train.seed"),
    *("schedule.on_spike", "schedule.max_extensions", "schedule.check_every"),
    *("model.attn_implementation", "model.freeze", "model.gradient_checkpointing", "model.liger"),
    *("model.sequence_parallel_size", "model.torch_compile"),
)
"""Prefixes of keys that have no effect on a script."""
_NEAR_THE_PEAK = 0.9


def resolve_script(inputs: PlanInputs[ScriptJob], model: ModelFacts | None, folder: str) -> Plan:
    """The plan of a job's script, which runs in `folder`. `model` is measured from the model that the job names.

    Raises RequestError.
    """
    inputs, shape = _with_auto_scheduler(inputs)
    job, user = inputs.job, inputs.ds_config
    batch = _batch(inputs)
    length = _length(job, batch.train_batch_size)
    decided = _decide_lr(inputs, model, length, shape)
    composed = _composed(inputs, model, batch, length, decided)
    return Plan(
        launcher=__version__,
        workload=Script(job=job, model=model, arguments=tuple(job.script.command), folder=folder),
        machine=inputs.machine,
        world=inputs.world,
        precision=inputs.precision,
        zero_stage=zero_stage(user),
        train_batch_size=batch.train_batch_size,
        train_micro_batch_size_per_gpu=batch.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        length=length,
        learning_rate=_as_stepped(decided.learning_rate, composed.config, length.total_updates),
        ds_config=composed.config,
        ds_config_changes=changes_of(composed),
        warnings=tuple(_warnings(inputs, decided.learning_rate, composed.config, length)),
    )


def check_script_inputs(inputs: PlanInputs[ScriptJob]) -> None:
    """Raises RequestError for errors that do not depend on the model."""
    check_packing(inputs)
    inputs, shape = _with_auto_scheduler(inputs)
    zero_stage(inputs.ds_config)
    length = _length(inputs.job, _batch(inputs).train_batch_size)
    if inputs.job.model is None:
        _decide_lr(inputs, None, length, shape)


def trainer_arguments(plan: Plan) -> dict[str, str]:
    """The plan's numbers as text, by their names in transformers' TrainingArguments.

    These are the numbers that a Trainer compares with its DeepSpeed JSON (it fails if they differ), and `max_steps`.
    """
    config = plan.ds_config
    optimizer, scheduler = (config.get(name, {}).get("params", {}) for name in ("optimizer", "scheduler"))
    beta1, beta2 = optimizer.get("betas", (None, None))
    values: dict[str, Any] = {
        "learning_rate": optimizer.get("lr"),
        "max_steps": plan.length.total_updates,
        "warmup_steps": scheduler.get("warmup_num_steps"),
        "per_device_train_batch_size": plan.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_grad_norm": config.get("gradient_clipping"),
        "weight_decay": optimizer.get("weight_decay"),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": optimizer.get("eps"),
        **{name: True for name in ("bf16", "fp16") if plan.precision == name},
        # Without it accelerate does not see the other ranks.
        "use_cpu": True if plan.world.device == "cpu" else None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def fill_arguments(plan: Plan, script: Script, paths: Mapping[str, str]) -> list[str]:
    """The arguments of the plan's script, with the plan's numbers and `paths` (name: path) filled in.

    The argument {trainer_args} becomes all `trainer_arguments` as options; {learning_rate} and so on become one number.
    Other text in braces does not change.
    """
    numbers, arguments = trainer_arguments(plan), []
    for argument in script.arguments:
        if argument == "{trainer_args}":
            arguments += [text for name, value in numbers.items() for text in (f"--{name}", value)]
        else:
            arguments.append(fill_placeholders(argument, {**numbers, **paths}))
    return arguments


def fill_placeholders(text: str, values: Mapping[str, str]) -> str:
    """`text` with each {name} replaced by its value."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _batch(inputs: PlanInputs[ScriptJob]) -> BatchSizes:
    """The three sizes. Raises RequestError if the micro-batch, which the script decides, is not set."""
    given, (batch, micro, accumulation) = inputs.given_batch, KEYS
    if micro not in given:
        raise RequestError(
            Problem(
                "the script's own data loader decides the micro-batch, so it must be set here",
                key=f"train.{micro}",
                hint="for example 4; {per_device_train_batch_size} in the script's arguments becomes this number",
            )
        )
    if batch not in given:
        given = {accumulation: 1, **given}
    return resolve_batch(given, inputs.world.size, lambda _: True)


def _length(job: ScriptJob, batch: int) -> Length:
    train = job.train
    if train.max_steps is None and train.total_samples is None:
        message = (
            "the launcher does not know a script's epochs"
            if train.num_train_epochs
            else "the length of the run is not set"
        )
        hint = "set train.max_steps (updates) or train.total_samples (sequences)"
        key = "train.num_train_epochs" if train.num_train_epochs else "train"
        raise RequestError(Problem(message, key=key, hint=hint))
    updates = train.max_steps or math.ceil((train.total_samples or 0) / batch)
    check_updates(updates, "total_samples")
    samples = updates * batch
    return Length(
        total_updates=updates,
        updates_per_epoch=0.0,
        samples=samples,
        tokens_per_update=0.0,
        refilled_samples=samples - (train.total_samples or samples),
    )


def _with_auto_scheduler(inputs: PlanInputs[ScriptJob]) -> tuple[PlanInputs[ScriptJob], str | None]:
    """The inputs, with a scheduler whose params are all "auto" replaced by "auto"; and its shape, else None.

    transformers' examples have such schedulers, which a Trainer fills in.
    """
    user = inputs.ds_config
    written = auto_scheduler(user)
    if written is None:
        return inputs, None
    shape = next((shape for shape, kind in DEEPSPEED_TYPES.items() if kind == written), None)
    return inputs.with_ds_config(replace(user, data={**user.data, "scheduler": "auto"})), shape


def _decide_lr(
    inputs: PlanInputs[ScriptJob], model: ModelFacts | None, length: Length, shape: str | None
) -> LearningRateDecision:
    """The learning rate under the script's JSON, which may set the `shape`.

    Raises RequestError for a schedule that DeepSpeed's own schedulers cannot produce.
    """
    job = inputs.job
    _check_shape(job)
    if shape is not None and job.schedule.shape == "auto":
        job = job.model_copy(update={"schedule": job.schedule.model_copy(update={"shape": shape})})
        inputs = replace(inputs, job=job)
    if model is None:
        _check_peak(job, inputs.ds_config)
    lora = job.model.lora if job.model is not None else None
    situation = situation_of(inputs, model, lora, length.total_updates)
    decided = decide_schedule(inputs, situation, limited=model is not None)
    if decided.scheduler is None:
        raise _below_the_start(decided.learning_rate)
    return decided


def _below_the_start(learning_rate: LearningRate) -> RequestError:
    warmup = learning_rate.warmup_updates
    return RequestError(
        Problem(
            f"a linear schedule in the DeepSpeed JSON cannot end at {learning_rate.floor_lr / learning_rate.peak_lr:g} "
            f"of the peak: WarmupDecayLR has one minimum for both ends, and with {warmup} updates of warm-up it is "
            f"1/{warmup + 1} of the peak",
            key="schedule.floor",
            hint="remove the floor, warm up longer, or use the shape cosine",
        )
    )


def _check_shape(job: ScriptJob) -> None:
    shape = job.schedule.shape
    if shape != "auto" and shape not in DEEPSPEED_TYPES:
        raise RequestError(
            Problem(
                f"DeepSpeed has no scheduler for {shape}, and a script uses the scheduler of the DeepSpeed JSON",
                key="schedule.shape",
                hint=f"use one of {', '.join(DEEPSPEED_TYPES)}",
            )
        )


def _check_peak(job: ScriptJob, user: DsConfig) -> None:
    written = (optimizer_of(user) or {}).get("params", {}).get("lr")
    if job.schedule.peak_lr == "auto" and written is None and scheduler_of(user) is None:
        raise RequestError(
            Problem(
                "the advised learning rate depends on the model's size, but the job names no model",
                key="schedule.peak_lr",
                hint="set it, or set model.name_or_path: that model is measured, not trained",
            )
        )


def _composed(
    inputs: PlanInputs[ScriptJob],
    model: ModelFacts | None,
    batch: BatchSizes,
    length: Length,
    decided: LearningRateDecision,
) -> Composed:
    user, dropped = (inputs.ds_config, ()) if model else _without_sizes(inputs.ds_config)
    composed = compose(
        user,
        decisions_of(
            inputs,
            batch,
            optimizer_lr=decided.optimizer_lr,
            scheduler=decided.scheduler,
            hidden_size=model.hidden_size if model else None,
            explicit=inputs.explicit,
            total_num_steps=length.total_updates,
            warmup_num_steps=decided.learning_rate.warmup_updates,
        ),
    )
    return replace(composed, changes=(*dropped, *composed.changes))


def _without_sizes(user: DsConfig) -> tuple[DsConfig, Sequence[Change]]:
    """The JSON without each "auto" that depends on a model's hidden size."""
    data = copy.deepcopy(user.data)
    block = data.get("zero_optimization")
    block = block if isinstance(block, dict) else {}
    written = (name for key in BUCKET_SIZES for name in dict.fromkeys((key, key.removeprefix("stage3_"))))
    names = [name for name in written if block.get(name) == "auto"]
    for name in names:
        del block[name]
    reason = "left to DeepSpeed's default: it depends on the hidden size, and the job names no model"
    changes = [Change(f"zero_optimization.{name}", "auto", None, reason) for name in names]
    return replace(user, data=data), changes


def _as_stepped(learning_rate: LearningRate, config: Mapping[str, Any], updates: int) -> LearningRate:
    """The learning rate as a script's engine steps it: without the launcher's advance by one step at the start."""
    if learning_rate.schedule is None:
        return learning_rate
    scheduler, lr = config["scheduler"], config["optimizer"]["params"]["lr"]
    sentences = deepspeed_warnings(scheduler["type"], scheduler["params"], lr, updates)
    reasons = tuple(
        ChoiceReason(choice="scheduler", value=scheduler["type"], reason=sentence) for sentence in sentences
    )
    return learning_rate.model_copy(update={"advance": 0, "reasons": (*learning_rate.reasons, *reasons)})


def _warnings(
    inputs: PlanInputs[ScriptJob], learning_rate: LearningRate, config: Mapping[str, Any], length: Length
) -> list[str]:
    warnings = []
    if unused := _unused(inputs):
        warnings.append(f"not used, because the script does this itself: {', '.join(unused)}")
    if inputs.job.checkpoint.upload is not None:
        warnings.append("checkpoint.upload is set, but a script's files are not uploaded: the script must do it")
    if length.refilled_samples:
        warnings.append(
            f"the last update is filled up with {length.refilled_samples} samples beyond train.total_samples"
        )
    scheduler = config.get("scheduler")
    if scheduler is not None and any("{trainer_args}" in argument for argument in inputs.job.script.command):
        warnings += _two_peaks(scheduler["params"].get("warmup_max_lr"), config["optimizer"]["params"]["lr"])
    if scheduler is not None:
        curve = replica(scheduler["type"], scheduler["params"], config["optimizer"]["params"]["lr"])
        highest = max(curve.lr_after(update) for update in range(length.total_updates))
        if highest < _NEAR_THE_PEAK * learning_rate.peak_lr:
            warnings.append(
                f"the peak of {learning_rate.peak_lr:g} is not reached in {length.total_updates} updates; the highest "
                f"learning rate is {highest:g}"
            )
    return warnings


def _two_peaks(highest: float | None, lr: float) -> list[str]:
    """A warning if the peaks differ: a Trainer compares its learning_rate with both."""
    if highest is None or highest == lr:
        return []
    return [
        f"{{trainer_args}} contains --learning_rate {lr}, the value of optimizer.params.lr, but "
        f"scheduler.params.warmup_max_lr is {highest}: a transformers Trainer compares its learning rate with both and "
        f"fails. Make them equal."
    ]


def _unused(inputs: PlanInputs[ScriptJob]) -> list[str]:
    """The keys that the user set and that have no effect on a script."""
    return sorted(key for key in inputs.explicit if key.startswith(_UNUSED))
