"""Making a plan: reads what the job names, measures what must be measured, and resolves it all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from launcher.ds_config import DsConfig, auto_scheduler, from_job, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.check import check_completed_config, check_config, check_optimizer_keys
from launcher.ds_config.facts import Precision
from launcher.ds_config.loop_rules import needed_packages
from launcher.ds_config.target import Target
from launcher.errors import Problem, RequestError, nearest
from launcher.job import Job, ScriptJob, explicit_keys, is_for_a_script, placing, read_job, read_script_job
from launcher.job.read import load_yaml, read_text
from launcher.plan.facts import MachineFacts
from launcher.plan.preset import IN_ORDER, recommend
from launcher.plan.resolve import check_request, precision_without_model, resolve, resolve_precision, resolve_world
from launcher.plan.schema import Plan, Script, ScriptPlan, World
from launcher.plan.script import check_script_request, resolve_script
from launcher.prepare import prepare, prepare_model
from launcher.prepare.machine import measure_machine, missing_packages
from launcher.prepare.sources import find_model_folder, find_split_data
from launcher.presets import preset_names, shipped_folder
from launcher.secret_names import is_secret

OnProgress = Callable[[dict[str, object]], None]
P = TypeVar("P", bound=Plan)
AUTO = "auto"


@dataclass(frozen=True)
class Checked:
    """What a plan begins with once all that can be told without model and data is found good.

    The job's DeepSpeed JSON as the user wrote it, what lint warns of in it, and this machine.
    """

    ds_config: DsConfig
    notes: tuple[str, ...]
    machine: MachineFacts


def make_plan(
    job: Job,
    checked: Checked,
    on_progress: OnProgress,
    log: IO[bytes] | int = subprocess.DEVNULL,
    *,
    preset: str | None = None,
) -> Plan:
    """The plan of `job`, which `check_job` has looked at. Raises RequestError.

    `preset` is what `deepspeed: auto` came to before, where a run goes on that began with it.
    """
    machine = checked.machine
    prepared = prepare(job, on_progress, log)
    if job.deepspeed != AUTO:
        return _with_notes(resolve(job, checked.ds_config, prepared.model, prepared.data, machine), checked)
    presets = {name: _preset(name) for name in IN_ORDER}
    chosen = recommend(job, presets, prepared.model, prepared.data, machine, kept=preset)
    plan = resolve(job, presets[chosen.preset], prepared.model, prepared.data, machine)
    told = f"deepspeed: auto takes {chosen.preset}: {chosen.reason}"
    return plan.model_copy(update={"recommendation": chosen, "warnings": (told, *plan.warnings)})


def check_job(job: Job, job_file: str, machine: MachineFacts | None = None) -> Checked:
    """Raises RequestError for what can be told without model and data, on this machine where no other is given."""
    checked = _linted(job, job_file, machine or measure_machine())
    check_request(job, checked.ds_config, checked.machine)
    _check_folder(job.output_dir, "output_dir", job_file)
    if job.data.cache_dir is not None:
        _check_folder(job.data.cache_dir, "data.cache_dir", job_file)
    find_model_folder(job.model.name_or_path, job.model.gguf_file)
    find_split_data(job.data)
    return checked


def plan_job_file(job_file: Path, overrides: Sequence[str], on_progress: OnProgress) -> Plan:
    """The plan of a job file, which may be one for a script that is not named yet. Raises RequestError."""
    if is_for_a_script(job_file, overrides):
        script_job = read_script_job(job_file, overrides)
        with placing(job_file, overrides):
            ready = check_script_job(script_job, str(job_file))
            return make_script_plan(script_job, Script(arguments=(), folder=""), ready, on_progress)
    job = read_job(job_file, overrides)
    with placing(job_file, overrides):
        return make_plan(job, check_job(job, str(job_file)), on_progress)


def make_script_plan(
    job: ScriptJob, script: Script, checked: Checked, on_progress: OnProgress, log: IO[bytes] | int = subprocess.DEVNULL
) -> ScriptPlan:
    """The plan of a script of the user's own, whose job `check_script_job` has looked at. Raises RequestError."""
    model = None
    if job.model is not None:
        cache = Path(job.output_dir).expanduser().resolve() / ".cache"
        model = prepare_model(job.model, cache, on_progress, log)
    return _with_notes(resolve_script(job, checked.ds_config, model, checked.machine, script), checked)


def check_script_job(job: ScriptJob, job_file: str, machine: MachineFacts | None = None) -> Checked:
    """As `check_job`, of a job for a script of the user's own. Raises RequestError."""
    if job.deepspeed == AUTO:
        found = "a preset is chosen by the memory that model and data take, and those are the script's own"
        hint = f"name one: {', '.join(preset_names())}"
        raise RequestError(Problem(found, key="deepspeed", hint=hint))
    checked = _linted(job, job_file, machine or measure_machine())
    check_script_request(job, checked.ds_config, checked.machine)
    _check_folder(job.output_dir, "output_dir", job_file)
    if job.model is not None:
        find_model_folder(job.model.name_or_path, job.model.gguf_file)
    return checked


def _linted(job: Job, job_file: str, machine: MachineFacts) -> Checked:
    """Raises RequestError for what lint calls an error in the job's JSON."""
    user = load_ds_config(job, job_file)
    return Checked(user, (*lint_ds_config(job, user, machine), *_secrets_in(job)), machine)


def _secrets_in(job: Job) -> Iterator[str]:
    """A warning for each variable of cluster.env that looks like a secret."""
    for name in filter(is_secret, job.cluster.env):
        yield (
            f"cluster.env.{name} looks like a secret, and is written to plan.json and job.yaml: "
            "set it in the environment in which the run is started"
        )


def _check_folder(name: str, key: str, job_file: str) -> None:
    """Can something be written at `name`, which need not be there yet?"""
    path = Path(name).expanduser().absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise RequestError(Problem(f"{there} is a file; a folder is needed", file=job_file, key=key))
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(Problem(f"{there} may not be written to", file=job_file, key=key))


def load_ds_config(job: Job, job_file: str) -> DsConfig:
    """The DeepSpeed JSON that the job names or holds; for `auto` a preset that stands for them all. RequestErrors."""
    if isinstance(job.deepspeed, dict):
        return _inline(job.deepspeed, job_file)
    path = Path(job.deepspeed).expanduser()
    if path.is_file():
        return read_ds_config(path)
    if job.deepspeed == AUTO:
        return _preset(IN_ORDER[0])
    if job.deepspeed in preset_names():
        return _preset(job.deepspeed)
    match = nearest(path.stem, preset_names())
    raise RequestError(
        Problem(
            f"there is no file {job.deepspeed} (looked from {Path.cwd()})",
            file=job_file,
            key="deepspeed",
            hint=f"did you mean the preset {match}?" if match else f"presets: {', '.join(preset_names())}",
        )
    )


def lint_ds_config(job: Job, user: DsConfig, machine: MachineFacts) -> tuple[str, ...]:
    """The warnings of lint about the job's own JSON. Raises RequestError for what it calls an error.

    Nothing but this may look at a JSON first: what composes it takes for granted that blocks are blocks.
    """
    explicit = explicit_keys(job)
    keys, target = load_catalogue(), _target(job, user, machine)
    replaced, unsafe = _replaced(job, user), job.schedule.allow_unsafe
    told = check_config(user, target, keys, replaced=replaced, allow_unsafe=unsafe)
    train = job.train
    asked = {"betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay}
    requested = {name: value for name, value in asked.items() if f"train.{name}" in explicit}
    check_optimizer_keys(user, requested, target, keys)
    return (keys.warning, *told) if keys.warning else told


def _target(job: Job, user: DsConfig, machine: MachineFacts) -> Target:
    world = resolve_world(job, machine)
    return Target(
        device=world.device,
        world_size=world.data_parallel_size,
        missing=missing_packages(needed_packages(user.data)),
        script=isinstance(job, ScriptJob),
        dtype=_precision(job, user, world, machine),
    )


def _precision(job: Job, user: DsConfig, world: World, machine: MachineFacts) -> Precision:
    if isinstance(job, ScriptJob) and job.model is None:
        return precision_without_model(user, world, machine)
    return resolve_precision(job, user, world, machine)


def _replaced(job: Job, user: DsConfig) -> tuple[str, ...]:
    """Blocks of the JSON that the plan writes itself."""
    generated = "schedule.shape" in explicit_keys(job) or auto_scheduler(user) is not None
    return ("scheduler",) if generated else ()


def _with_notes(plan: P, checked: Checked) -> P:
    """The plan with what lint warns of, and with folders that are missing here.

    Raises RequestError where what the plan filled in goes wrong with the rest of the JSON.
    """
    job, user = plan.job, checked.ds_config
    replaced = ("scheduler",) if plan.learning_rate.schedule is not None else _replaced(job, user)
    check_completed_config(
        user,
        plan.ds_config,
        _target(job, user, checked.machine),
        load_catalogue(),
        replaced=replaced,
        allow_unsafe=job.schedule.allow_unsafe,
    )
    return plan.model_copy(update={"warnings": (*checked.notes, *_missing_folders(user), *plan.warnings)})


def _missing_folders(user: DsConfig) -> Iterator[str]:
    for block in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{block}.nvme_path"
        if isinstance(path := user.get(key), str) and not Path(path).is_dir():
            hint = "Make sure that every node has it on a disk of its own."
            yield str(user.problem(key, f"there is no folder {path} on this machine", hint))


def _preset(name: str) -> DsConfig:
    return read_ds_config(shipped_folder("ds_configs") / f"{name}.json")


def _inline(data: dict[str, Any], job_file: str) -> DsConfig:
    """The mapping in a job file, with the lines that its keys stand on."""
    lines: dict[str, int] = {}
    if Path(job_file).is_file():
        _, found = load_yaml(read_text(Path(job_file)), job_file)
        lines = {".".join(path[1:]): line for path, line in found.items() if path[0] == "deepspeed" and path[1:]}
    return from_job(data, job_file, "deepspeed", lines)
