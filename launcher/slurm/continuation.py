"""The Slurm job that continues a run after the time limit of the one before: when there may be one, and its options."""

from __future__ import annotations

from typing import Any

from launcher.errors import RunFailed
from launcher.job import AnyJob
from launcher.records import ContinuationRecord
from launcher.run_dir import RunDir
from launcher.slurm.allocation import nodes_and_spares
from launcher.watch.run_session import int_of, read_json, text_of

DEFAULT_MAX_JOBS = 10
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
"""Variables of a job's task that name its GPUs: another job has others."""


def read_continuation(run: RunDir) -> ContinuationRecord | None:
    """The newest job that was submitted to continue the run; None if there was none. Raises RunFailed if damaged."""
    found = read_json(run.continuation_file)
    if found is None:
        if run.continuation_file.exists():
            raise _damaged(run)
        return None
    return _checked(run, found)


def _checked(run: RunDir, found: dict[str, Any]) -> ContinuationRecord:
    job, continues = found.get("job"), text_of(found.get("continues"))
    number, update = int_of(found.get("number")), int_of(found.get("update"))
    if continues is None or number is None or update is None or not (job is None or isinstance(job, str)):
        raise _damaged(run)
    return {"time": str(found.get("time")), "job": job, "continues": continues, "number": number, "update": update}


def _damaged(run: RunDir) -> RunFailed:
    return RunFailed(f"{run.continuation_file} is damaged, so the number of jobs is unknown")


def continues_by_itself(run: RunDir, job: str) -> bool:
    """Whether `job` was submitted to continue the run, and not by a user."""
    return (read_json(run.continuation_file) or {}).get("job") == job


def job_number(last: ContinuationRecord | None, job: str) -> int:
    """Which job in a row this one is, from 1: a job that a user submitted starts to count again."""
    return last["number"] if last is not None and last["job"] == job else 1


def why_not_continued(last: ContinuationRecord | None, job: str, begun: int, saved: int, max_jobs: int) -> str | None:
    """Why no job may be submitted to continue the run after `job`; None if one may be.

    `begun` is the update at which the run started in `job`, and `saved` that of its newest checkpoint.
    """
    if last is not None and last["continues"] == job:
        submitted = f"job {last['job']}" if last["job"] else "a job"
        return f"{submitted} was submitted already to continue job {job}"
    if saved <= begun:
        return f"no new checkpoint was saved since job {job} started"
    if job_number(last, job) >= max_jobs:
        return f"job {job} was the last of {max_jobs} in a row (slurm.max_jobs)"
    return None


def continuing(job: AnyJob, after: str, nodes: int) -> AnyJob:
    """The job as it is submitted to continue a run after the Slurm job `after`, on `nodes` nodes with spare nodes."""
    with_ranks, spares = nodes_and_spares(nodes, job.cluster.nodes, job.cluster.spare_nodes)
    slurm = {"dependency": f"afterany:{after}", "array": None, "array_key": None}
    return job.model_copy(
        update={
            "slurm": job.slurm.model_copy(update=slurm),
            "cluster": job.cluster.model_copy(update={"nodes": with_ranks, "spare_nodes": spares}),
        }
    )
