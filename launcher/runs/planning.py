"""Making a plan: reads the files that the job names, measures model and data, and resolves every value."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.ds_config import DsConfig, auto_scheduler, from_job, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.check import check_completed_config, check_config, check_optimizer_keys
from launcher.ds_config.loop_rules import needed_packages
from launcher.ds_config.target import Target
from launcher.errors import Problem, RequestError, nearest, os_error_text
from launcher.job import AnyJob, Job, LoadedJob, ScriptJob, check_loaded
from launcher.job.user_path import user_path
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import PlanInputs, is_script, is_training, plan_inputs
from launcher.plan.preset import PRESETS_IN_ORDER, recommend
from launcher.plan.resolve import check_inputs, resolve
from launcher.plan.schema import Plan
from launcher.plan.script import check_script_inputs, resolve_script
from launcher.prepare import cache_folder, prepare, prepare_model
from launcher.prepare.machine import measure_machine, missing_packages
from launcher.prepare.sources import find_model_folder, find_split_data
from launcher.presets import preset_names, shipped_folder
from launcher.secret_names import is_secret

OnProgress = Callable[[dict[str, object]], None]
AUTO = "auto"


@dataclass(frozen=True)
class CheckedJob:
    """A job that passed all checks that need neither model nor data. `notes` are warnings, most of them of lint."""

    loaded: LoadedJob
    inputs: PlanInputs[AnyJob]
    notes: tuple[str, ...]


def check_job(
    loaded: LoadedJob, machine: MachineFacts | None = None, *, kept_micro_batch: int | None = None
) -> CheckedJob:
    """Checks a job for this machine, or for `machine`, without measuring model and data.

    `kept_micro_batch` is the micro-batch of the run that the job resumes. Raises RequestError with file and line of
    each key.
    """
    check_loaded(loaded)
    with loaded.locate_errors(), _invalid_paths():
        job, here = loaded.job, machine or measure_machine()
        if isinstance(job, ScriptJob) and job.deepspeed == AUTO:
            found = "auto chooses a preset by the memory of model and data, which are unknown for a script"
            hint = f"name a preset: {', '.join(preset_names())}"
            raise RequestError(Problem(found, key="deepspeed", hint=hint))
        inputs = plan_inputs(job, load_ds_config(loaded), here, kept_micro_batch=kept_micro_batch)
        notes = (*lint_ds_config(inputs), *_secrets_in(job))
        if is_script(inputs):
            check_script_inputs(inputs)
        elif is_training(inputs):
            check_inputs(inputs)
        _check_paths(job, loaded.origin)
        return CheckedJob(loaded, inputs, notes)


@contextmanager
def _invalid_paths() -> Iterator[None]:
    """Raises RequestError for a path that no file system accepts."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise RequestError(Problem(os_error_text(error))) from None


def make_plan(
    job: LoadedJob | CheckedJob,
    *,
    on_progress: OnProgress = lambda _: None,
    log: IO[bytes] | int = subprocess.DEVNULL,
    preset: str | None = None,
) -> Plan:
    """The plan of a job. Measures the model and tokenises the data, unless the results are cached. Starts nothing.

    `on_progress` receives progress messages, and `log` the output of libraries. `preset` is the one that
    `deepspeed: auto` chose in the run that the job resumes. Raises RequestError.
    """
    checked = job if isinstance(job, CheckedJob) else check_job(job)
    with checked.loaded.locate_errors():
        inputs = checked.inputs
        if is_script(inputs):
            return _with_notes(
                resolve_script(inputs, _script_model(inputs.job, on_progress, log), _folder(inputs.job)), checked
            )
        assert is_training(inputs)
        prepared = prepare(inputs.job, on_progress, log)
        if inputs.job.deepspeed != AUTO:
            return _with_notes(resolve(inputs, prepared.model, prepared.data), checked)
        presets = {name: _preset(name) for name in PRESETS_IN_ORDER}
        chosen = recommend(inputs, presets, prepared.model, prepared.data, kept=preset)
        plan = resolve(inputs.with_ds_config(presets[chosen.preset]), prepared.model, prepared.data)
        reason = f"deepspeed: auto chose {chosen.preset}: {chosen.reason}"
        workload = plan.training.model_copy(update={"recommendation": chosen})
        return plan.model_copy(update={"workload": workload, "warnings": (reason, *checked.notes, *plan.warnings)})


def _script_model(job: ScriptJob, on_progress: OnProgress, log: IO[bytes] | int) -> ModelFacts | None:
    """The measurements of the model that a script's job names for learning-rate advice, if any."""
    if job.model is None:
        return None
    return prepare_model(job.model, cache_folder(job), on_progress, log)


def _folder(job: ScriptJob) -> str:
    return str(user_path(job.script.folder, "script.folder").absolute())


def _secrets_in(job: AnyJob) -> Iterator[str]:
    """A warning for each variable of cluster.env that looks like a secret."""
    for name in filter(is_secret, job.cluster.env):
        yield (
            f"cluster.env.{name} looks like a secret, and is written to plan.json and job.yaml: "
            "set it in the environment of the launcher instead"
        )


def _check_paths(job: AnyJob, origin: str) -> None:
    """Raises RequestError if a folder cannot be written, or if model or data do not exist."""
    _check_folder(job.output_dir, "output_dir", origin)
    if isinstance(job, Job) and job.data.cache_dir is not None:
        _check_folder(job.data.cache_dir, "data.cache_dir", origin)
    if job.model is not None:
        find_model_folder(job.model.name_or_path, job.model.gguf_file)
    if isinstance(job, Job):
        find_split_data(job.data)


def _check_folder(name: str, key: str, origin: str) -> None:
    """Raises RequestError if the folder `name`, which may not exist yet, is not writable."""
    path = user_path(name, key).absolute()
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir():
        raise RequestError(Problem(f"{existing} is a file; a folder is needed", file=origin, key=key))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(Problem(f"{existing} is not writable", file=origin, key=key))


def load_ds_config(loaded: LoadedJob) -> DsConfig:
    """The DeepSpeed JSON that the job names or contains; for `auto` the first preset. Raises RequestError."""
    named = loaded.job.deepspeed
    if isinstance(named, dict):
        return from_job(named, loaded.origin, "deepspeed", loaded.lines_in("deepspeed"))
    path = user_path(named, "deepspeed")
    if path.is_file():
        return read_ds_config(path)
    if named == AUTO:
        return _preset(PRESETS_IN_ORDER[0])
    if named in preset_names():
        return _preset(named)
    match = nearest(path.stem, preset_names())
    raise RequestError(
        Problem(
            f"the file {named} does not exist (current folder: {Path.cwd()})",
            key="deepspeed",
            hint=f"did you mean the preset {match}?" if match else f"presets: {', '.join(preset_names())}",
        )
    )


def lint_ds_config(inputs: PlanInputs[AnyJob]) -> tuple[str, ...]:
    """The warnings of lint about the job's DeepSpeed JSON. Raises RequestError for errors of lint.

    Call this before `compose`, which relies on the types that lint checks.
    """
    job, user = inputs.job, inputs.ds_config
    keys, target = load_catalogue(), _target(inputs)
    warnings = check_config(user, target, keys, replaced=_replaced(inputs), allow_unsafe=job.schedule.allow_unsafe)
    train = job.train
    values = {"betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay}
    set_in_job = {name: value for name, value in values.items() if f"train.{name}" in inputs.explicit}
    check_optimizer_keys(user, set_in_job, target, keys)
    return (keys.warning, *warnings) if keys.warning else warnings


def _target(inputs: PlanInputs[AnyJob]) -> Target:
    return Target(
        device=inputs.world.device,
        world_size=inputs.world.data_parallel_size,
        missing=missing_packages(needed_packages(inputs.ds_config.data)),
        script=isinstance(inputs.job, ScriptJob),
        dtype=inputs.precision,
    )


def _replaced(inputs: PlanInputs[AnyJob]) -> tuple[str, ...]:
    """Blocks of the JSON that the plan replaces."""
    generated = "schedule.shape" in inputs.explicit or auto_scheduler(inputs.ds_config) is not None
    return ("scheduler",) if generated else ()


def _with_notes(plan: Plan, checked: CheckedJob) -> Plan:
    """The plan with lint's warnings, and with warnings about folders that do not exist on this machine.

    Raises RequestError if a filled-in value conflicts with the rest of the JSON.
    """
    inputs = checked.inputs
    user = inputs.ds_config
    replaced = ("scheduler",) if plan.learning_rate.schedule is not None else _replaced(inputs)
    check_completed_config(
        user,
        plan.ds_config,
        _target(inputs),
        load_catalogue(),
        replaced=replaced,
        allow_unsafe=inputs.job.schedule.allow_unsafe,
    )
    return plan.model_copy(update={"warnings": (*checked.notes, *_missing_folders(user), *plan.warnings)})


def _missing_folders(user: DsConfig) -> Iterator[str]:
    for block in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{block}.nvme_path"
        if isinstance(path := user.get(key), str) and not Path(path).is_dir():
            hint = "Make sure that it exists on a local disk of every node."
            yield str(user.problem(key, f"the folder {path} does not exist on this machine", hint))


def _preset(name: str) -> DsConfig:
    return read_ds_config(shipped_folder("ds_configs") / f"{name}.json")
