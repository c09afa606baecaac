"""The Slurm allocation of this task: its job, its nodes, and this node's CPUs and GPUs."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import Problem, RequestError

_BRACKETS = re.compile(r"^(?P<head>[^\[\]]*)\[(?P<ranges>[^\[\]]+)\](?P<tail>.*)$")
_NOT_IN_BRACKETS = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class Allocation:
    """One task per node of a Slurm job. `restart` counts how often the job was requeued; `step` is the step id."""

    job_id: str
    restart: int
    node: int
    hosts: tuple[str, ...]
    cpus: int
    gpus: int
    step: str = "0"

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def start(self) -> str:
        """Identifies this start of the job and this call of srun."""
        return f"{self.job_id}-{self.restart}-{self.step}"

    @property
    def stamp(self) -> str:
        """The part of the run directory's name that identifies the job."""
        return f"slurm-{self.job_id}"


def nodes_and_spares(allocated: int, nodes: int, spares: int) -> tuple[int, int]:
    """(nodes with ranks, spare nodes) among the allocated nodes, for a job that asks for `nodes` and `spares`.

    In a smaller allocation there are fewer spare nodes first.
    """
    kept = min(spares, max(0, allocated - nodes))
    return allocated - kept, kept


def run_stamp(environment: Mapping[str, str]) -> str:
    """The stamp of the Slurm job of this process. Raises RequestError outside of Slurm."""
    return f"slurm-{_job_id(environment)}"


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The task's allocation, from Slurm's variables. Raises RequestError unless srun started one task per node."""
    job_id = _job_id(environment)
    if "SLURM_NODEID" not in environment:
        raise _problem(
            "this is not a task of srun: SLURM_NODEID is not set", "start it with: srun launcher node JOB.yaml"
        )
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
    if int(environment.get("SLURM_NTASKS", len(hosts))) != len(hosts) or environment.get("SLURM_LOCALID", "0") != "0":
        found = f"srun started {environment.get('SLURM_NTASKS')} tasks on {len(hosts)} nodes"
        raise _problem(found, "start one task per node: --ntasks-per-node=1, and --nodes for the number of nodes")
    return Allocation(
        job_id=job_id,
        restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
        node=int(environment["SLURM_NODEID"]),
        hosts=hosts,
        cpus=int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or 1),
        gpus=int(environment.get("SLURM_GPUS_ON_NODE") or 0),
        step=environment.get("SLURM_STEP_ID", "0"),
    )


def expand_hosts(listed: str) -> tuple[str, ...]:
    """Expands a host list of Slurm, in order: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7 and login."""
    found: list[str] = []
    for part in _NOT_IN_BRACKETS.split(listed):
        found += _expand(part)
    return tuple(found)


def _expand(part: str) -> list[str]:
    match = _BRACKETS.match(part)
    if match is None:
        return [part]
    numbers = [number for piece in match["ranges"].split(",") for number in _numbers(piece)]
    return [match["head"] + number + tail for number in numbers for tail in _expand(match["tail"])]


def _numbers(piece: str) -> list[str]:
    first, _, last = piece.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def _job_id(environment: Mapping[str, str]) -> str:
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    if job := environment.get("SLURM_JOB_ID"):
        return job
    raise _problem(
        f"{socket.gethostname()} is not inside a Slurm job: SLURM_JOB_ID is not set",
        "submit it with: launcher submit JOB.yaml, or sbatch slurm/finetune.sbatch JOB.yaml",
    )


def _problem(found: str, hint: str) -> RequestError:
    return RequestError(Problem(found, hint=hint))
