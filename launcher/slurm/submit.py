"""Submission to Slurm: a pure function makes the script and command that --dry-run shows and that are submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import FunctionLoader, StrictUndefined, TemplateError, TemplateNotFound, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from launcher.errors import LauncherError, Problem, RequestError
from launcher.job import AnyJob
from launcher.job.slurm import is_plain
from launcher.job.user_path import user_path
from launcher.presets import shipped_folder
from launcher.secret_names import is_secret
from launcher.slurm.allocation import run_stamp
from launcher.slurm.container import container_command
from launcher.slurm.options import Option, log_file, may_lose_nodes, overriding_variables, sbatch_options
from launcher.slurm.sbatch_errors import SbatchError, explain_sbatch_error, query_status

SHIPPED = "submit.sbatch.j2"
_ANSWER = re.compile(r"(?P<job>[0-9]+)(?:;(?P<cluster>\S+))?")


@dataclass(frozen=True)
class SubmitContext:
    """What a request depends on besides the job: folder, launcher and environment of `launcher submit`."""

    cwd: Path
    launcher: str
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Templates:
    """The texts of the shipped template and of the one to render, whose file is `name`."""

    name: str
    texts: Mapping[str, str]

    def named(self, name: str) -> tuple[str, str, Callable[[], bool]] | None:
        """A template as jinja2 loads it, with its file name for tracebacks."""
        return (self.texts[name], name, lambda: True) if name in self.texts else None


@dataclass(frozen=True)
class SlurmRequest:
    """A batch job as it is submitted: sbatch reads `script` from standard input, in the folder `cwd`.

    `run` is the directory of the run to resume; None for a new run.
    """

    argv: tuple[str, ...]
    script: str
    unset: tuple[str, ...]
    cwd: Path
    output_dir: Path
    name: str
    log: str
    array: str | None
    run: Path | None = None

    def command(self) -> str:
        """The command for a shell, including the variables that are not passed on."""
        environment = ["env", *(word for name in self.unset for word in ("-u", name))] if self.unset else []
        return shlex.join([*environment, *self.argv])


@dataclass(frozen=True)
class SubmittedJob:
    """The id of a submitted job, and its cluster if Slurm names one."""

    id: str
    cluster: str | None = None

    def __str__(self) -> str:
        return f"{self.id};{self.cluster}" if self.cluster else self.id


def submit_context() -> SubmitContext:
    """The context of this process. Nodes call the submitting launcher by its path if that is known."""
    beside = Path(sys.executable).with_name("launcher")
    return SubmitContext(Path.cwd(), str(beside) if beside.is_file() else "launcher", tuple(os.environ))


def slurm_request(
    job: AnyJob,
    job_file: Path,
    overrides: Sequence[str],
    context: SubmitContext,
    templates: Templates,
    *,
    resume: bool = False,
) -> SlurmRequest:
    """The request for a job; with `resume` for a run, whose directory is given as `job_file`.

    Raises RequestError for values that are not safe for Slurm or a shell.
    """
    folder = _absolute(job.output_dir, context.cwd)
    given = str(_absolute(str(job_file), context.cwd))
    words = [*(["--resume"] if resume else []), given, *overrides]
    _check_words([str(context.cwd), str(folder), *words])
    if job.cluster.address not in ("auto", "local"):
        found = f"{job.cluster.address}, but a Slurm job starts its own Ray"
        raise RequestError(Problem(found, key="cluster.address", hint="leave it out, or submit with --to ray"))
    if secrets := [name for name in job.cluster.env if is_secret(name)]:
        found = "looks like a secret, but other users can read a batch script and its arguments"
        hint = "set it in the environment of the nodes"
        raise RequestError(*(Problem(found, key=f"cluster.env.{name}", hint=hint) for name in secrets))
    options = (*sbatch_options(job, folder), Option("chdir", str(context.cwd), explicit=False))
    folders = [folder, Path(given) if resume else Path(given).parent]
    script = render(templates, template_values(job, words, options, context, folders))
    left_out = [option for option in options if option.explicit and option.directive() not in _head(script)]
    return SlurmRequest(
        argv=("sbatch", "--parsable", *(option.argument() for option in left_out)),
        script=script,
        unset=overriding_variables(options, context.variables),
        cwd=context.cwd,
        output_dir=folder,
        name=job.name,
        log=log_file(job, folder),
        array=job.slurm.array,
        run=Path(given) if resume else None,
    )


def template_values(
    job: AnyJob, words: Sequence[str], options: Iterable[Option], context: SubmitContext, folders: Iterable[Path]
) -> dict[str, Any]:
    """The names that a template may use; `words` are arguments of `launcher node`, which needs the folders."""
    slurm, cwd = job.slurm, context.cwd
    container_options, launcher = container_command(slurm, cwd, folders)
    bare = not slurm.activate and not slurm.container
    return {
        "directives": [option.directive() for option in options],
        "modules": slurm.modules,
        "activate": _activate_script(slurm.activate, cwd) if slurm.activate else None,
        "container_options": container_options,
        "launcher": [context.launcher] if bare else launcher,
        "job_arguments": list(words),
        "array_key": slurm.array_key,
        "may_lose_nodes": may_lose_nodes(job),
        "job": job.model_dump(mode="json"),
    }


def render(templates: Templates, values: Mapping[str, Any]) -> str:
    """Renders the template. Raises RequestError naming the template's line."""
    environment = SandboxedEnvironment(
        loader=FunctionLoader(templates.named),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = _quote
    try:
        script = environment.get_template(templates.name).render(values)
    except TemplateSyntaxError as error:
        raise RequestError(Problem(f"not a jinja2 template: {error.message}", templates.name, error.lineno)) from None
    except TemplateNotFound as error:
        found = f"found {error.name}, but only {SHIPPED} can be included or extended"
        raise RequestError(Problem(found, templates.name, _template_line(error, templates))) from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        hint = f"a template may use {', '.join(sorted(values))}, and the filter quote"
        raise RequestError(Problem(str(error), templates.name, _template_line(error, templates), hint=hint)) from None
    if not script.startswith("#!"):
        hint = "start the template with #!/bin/bash"
        raise RequestError(Problem("the script does not start with #!", templates.name, 1, hint=hint))
    return script


def read_templates(job: AnyJob, cwd: Path) -> Templates:
    """The shipped template, and the job's own if it has one. Raises RequestError if that cannot be read."""
    shipped = (shipped_folder("slurm") / SHIPPED).read_text(encoding="utf-8")
    if job.slurm.template is None:
        return Templates(SHIPPED, {SHIPPED: shipped})
    path = _absolute(job.slurm.template, cwd)
    try:
        own = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RequestError(Problem(f"{path} cannot be read: {found}", key="slurm.template")) from None
    return Templates(str(path), {SHIPPED: shipped, str(path): own})


def submit_request(request: SlurmRequest, environment: Mapping[str, str]) -> tuple[SubmittedJob, str]:
    """Submits the request; returns the job and messages of sbatch. Raises RequestError or LauncherError."""
    request.output_dir.mkdir(parents=True, exist_ok=True)
    passed = {name: value for name, value in environment.items() if name not in request.unset}
    done = _run(request.argv, request.script, request.cwd, passed)
    if done.returncode != 0:
        raise _error_of(explain_sbatch_error(done.stderr.strip()), done)
    answer = _ANSWER.fullmatch((done.stdout.strip().splitlines() or [""])[-1])
    if answer is None:
        found = f"sbatch accepted the job but printed no job id, only {done.stdout.strip()!r}"
        raise LauncherError(f"{found}\n  squeue --me lists your jobs; sbatch may be a wrapper that ignores --parsable")
    return SubmittedJob(answer["job"], answer["cluster"]), done.stderr.strip()


def describe_submission(request: SlurmRequest, submitted: SubmittedJob) -> str:
    """Describes a submitted job for people: its status, its files, and commands to watch it."""
    status = query_status(submitted.id, submitted.cluster)
    new = f"{request.output_dir}/{request.name}-{run_stamp({'SLURM_JOB_ID': submitted.id})}"
    run = shlex.quote(str(request.run or new))
    if request.array and request.run is None:
        run += "_INDEX"
    log = request.log.replace("%j", submitted.id).replace("%A_%a", f"{submitted.id}_INDEX")
    cluster = f" --clusters={submitted.cluster}" if submitted.cluster else ""
    return "\n".join(
        [
            f"submitted job {submitted}{f': {status}' if status else ''}",
            f"  run directory    {run}",
            f"  output           {log}",
            f"  when it runs     launcher logs --follow {run}",
            f"                   launcher status {run}",
            f"                   launcher cancel {run}",
            f"  before           squeue --jobs {submitted.id}{cluster}, scancel {submitted.id}{cluster}",
        ]
    )


def _run(
    argv: Sequence[str], script: str, cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            input=script,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        hint = "submit from a node of a Slurm cluster, or with --to ray; --dry-run works anywhere"
        raise RequestError(Problem("sbatch is not installed here", hint=hint)) from None


def _error_of(found: SbatchError, done: subprocess.CompletedProcess[str]) -> LauncherError:
    message = done.stderr.strip() or f"sbatch ended with status {done.returncode} and printed nothing"
    if found.in_job:
        return RequestError(Problem(f"Slurm rejected the job: {message}", key=found.key, hint=found.hint))
    return LauncherError(f"Slurm did not answer: {message}")


def _check_words(words: Iterable[str]) -> None:
    for word in words:
        if not is_plain(word):
            found = f"{word!r} contains a line break, a control character or bytes that are not UTF-8"
            hint = "a batch script has one command per line: rename the file, or put the value into the job file"
            raise RequestError(Problem(found, hint=hint))


def _absolute(path: str, cwd: Path) -> Path:
    return cwd / user_path(path)


def _activate_script(path: str, cwd: Path) -> str:
    script = _absolute(path, cwd)
    return str(script if script.name == "activate" else script / "bin/activate")


def _quote(value: str | Iterable[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)


def _head(script: str) -> list[str]:
    """The lines in which sbatch reads options: those before the first command."""
    return list(takewhile(lambda line: not line.strip() or line.startswith("#"), script.split("\n")))


def _template_line(error: BaseException, templates: Templates) -> int | None:
    """The line of the template at which rendering failed, from jinja2's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == templates.name), None)
