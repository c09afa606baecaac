"""The options of sbatch for a job, in order, and the environment variables that would override them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, explicit_keys
from launcher.job.slurm import gres_gpus

_BARE = re.compile(r"[A-Za-z0-9_.,:=@%+*?&|!~/()\[\]-]*")


@dataclass(frozen=True)
class Option:
    """One option of sbatch. `explicit`: the job file sets it, so a template may not drop it."""

    name: str
    value: str | None = None
    explicit: bool = True

    def argument(self) -> str:
        """The option as one argument of a command."""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"

    def directive(self) -> str:
        """The option as a line of a script, quoted for sbatch."""
        if self.value is None or _BARE.fullmatch(self.value):
            return f"#SBATCH {self.argument()}"
        escaped = self.value.replace("\\", "\\\\").replace('"', '\\"')
        return f'#SBATCH --{self.name}="{escaped}"'


def sbatch_options(job: AnyJob, folder: Path) -> tuple[Option, ...]:
    """All options of the job, whose run directories are in `folder`. Raises RequestError for contradictions."""
    slurm, explicit = job.slurm, explicit_keys(job)
    options = [
        Option("job-name", job.name, explicit=False),
        Option("partition", slurm.partition),
        Option("account", slurm.account),
        Option("qos", slurm.qos),
        Option("time", slurm.time),
        Option("nodes", str(job.cluster.all_nodes), bool({"cluster.nodes", "cluster.spare_nodes"} & set(explicit))),
        Option("ntasks-per-node", "1", explicit=False),
        Option("cpus-per-task", _cpus(job)),
        Option("gres", _gres(job)),
        Option("mem", slurm.mem),
        Option("constraint", slurm.constraint),
        Option("reservation", slurm.reservation),
        Option("nodelist", slurm.nodelist),
        Option("exclude", slurm.exclude),
        Option("dependency", slurm.dependency),
        Option("array", slurm.array),
        Option("mail-user", slurm.mail_user),
        Option("mail-type", ",".join(slurm.mail_type) or None),
        Option("comment", slurm.comment),
        Option("output", _escaped(log_file(job, folder)), explicit=False),
        Option("open-mode", "append", explicit=False),
        Option("signal", f"B:USR1@{slurm.signal_seconds}", "slurm.signal_seconds" in explicit),
    ]
    flags = [Option("exclusive")] if slurm.exclusive else []
    if may_lose_nodes(job):
        flags.append(Option("no-kill"))
    flags.append(Option("requeue" if slurm.requeue else "no-requeue", explicit="slurm.requeue" in explicit))
    return (*(option for option in options if option.value is not None), *flags, *map(_extra, slurm.extra))


def may_lose_nodes(job: AnyJob) -> bool:
    """Whether the run continues without a node that it has lost, so that Slurm must not end the job then."""
    fewer = job.cluster.min_nodes is not None and job.cluster.min_nodes < job.cluster.nodes
    return fewer or job.cluster.spare_nodes > 0


def gpus_per_node(job: AnyJob) -> int:
    """The GPUs per node to request from Slurm. Raises RequestError if neither key sets a number."""
    named = gres_gpus(job.slurm.gres) if job.slurm.gres else None
    requested = job.cluster.gpus_per_node
    if requested == "auto" and named is None:
        raise RequestError(
            Problem(
                "auto, but Slurm gives a job only the GPUs that it requests",
                key="cluster.gpus_per_node",
                hint="set the number of GPUs per node, or request them in slurm.gres (gpu:h100:8); 0 trains on CPUs",
            )
        )
    if named is not None and requested not in ("auto", named):
        raise RequestError(
            Problem(
                f"{requested}, but slurm.gres requests {named} ({job.slurm.gres})",
                key="cluster.gpus_per_node",
                hint="set both to the same number, or leave cluster.gpus_per_node out",
            )
        )
    return named if requested == "auto" and named is not None else int(requested)


def log_file(job: AnyJob, folder: Path) -> str:
    """The file for the job's output, with Slurm's %j (or %A and %a) for the job id."""
    return f"{folder}/{job.name}-slurm-{'%A_%a' if job.slurm.array else '%j'}.log"


def overriding_variables(options: Iterable[Option], environment: Iterable[str]) -> tuple[str, ...]:
    """Names in `environment` that would override the options, or that belong to an outer Slurm job.

    Source: sbatch(1), input environment variables: they win over the options of a script.
    """
    overriding = {_WAITING, *(name for option in options for name in _VARIABLES.get(option.name, ()))}
    return tuple(sorted(name for name in environment if name in overriding or _belongs_to_a_job(name)))


def _belongs_to_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in _SETTINGS


def _cpus(job: AnyJob) -> str | None:
    """CPUs per node: as many as ranks if there are no GPUs; with GPUs the default of the site."""
    gpus, processes, cpus = gpus_per_node(job), job.cluster.processes_per_node, job.slurm.cpus_per_task
    ranks = gpus or (1 if processes == "auto" else processes)
    if cpus is not None and cpus < ranks:
        found = f"{cpus} CPUs for {ranks} ranks per node"
        raise RequestError(Problem(found, key="slurm.cpus_per_task", hint=f"set at least {ranks}"))
    if cpus is None and not gpus and processes != "auto":
        cpus = ranks
    return None if cpus is None else str(cpus)


def _gres(job: AnyJob) -> str | None:
    gres, gpus = job.slurm.gres, gpus_per_node(job)
    if gpus == 0 or (gres and gres_gpus(gres) is not None):
        return gres
    return ",".join(filter(None, (f"gpu:{gpus}", gres)))


def _escaped(log: str) -> str:
    """Doubles the percent signs of the folder, which Slurm would replace, as %x by the job's name."""
    folder, _, name = log.rpartition("/")
    if "\\" in folder:
        found = f"{folder} contains a backslash, which stops Slurm from writing the job id into the log's name"
        raise RequestError(Problem(found, key="output_dir", hint="choose a folder without a backslash"))
    return f"{folder.replace('%', '%%')}/{name}"


def _extra(text: str) -> Option:
    name, equals, value = text.removeprefix("--").partition("=")
    return Option(name, value if equals else None)


_SETTINGS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_DEBUG_FLAGS", "SLURM_EXIT_ERROR", "SLURM_UMASK", "SLURM_JWT"}
"""Variables that configure Slurm's commands and belong to no job."""

_WAITING = "SBATCH_WAIT"
"""With it sbatch would wait for the end of the job before it prints the job id."""

_VARIABLES = {
    "account": ("SBATCH_ACCOUNT",),
    "array": ("SBATCH_ARRAY_INX",),
    "constraint": ("SBATCH_CONSTRAINT",),
    "exclusive": ("SBATCH_EXCLUSIVE",),
    "gres": ("SBATCH_GRES", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK"),
    "job-name": ("SBATCH_JOB_NAME",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "no-requeue": ("SBATCH_REQUEUE",),
    "open-mode": ("SBATCH_OPEN_MODE",),
    "output": ("SBATCH_OUTPUT", "SBATCH_ERROR"),
    "partition": ("SBATCH_PARTITION",),
    "qos": ("SBATCH_QOS",),
    "requeue": ("SBATCH_NO_REQUEUE",),
    "reservation": ("SBATCH_RESERVATION",),
    "signal": ("SBATCH_SIGNAL",),
    "time": ("SBATCH_TIMELIMIT",),
}
"""Variables that override the options of a script: option → variables."""
