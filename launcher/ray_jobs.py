"""Submission to a Ray cluster that exists, as `ray job submit` does it, through the address of its dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from launcher.errors import Problem, RequestError, RunFailed, first_line
from launcher.job import Job
from launcher.job.user_path import user_path
from launcher.secret_names import is_secret

Tell = Callable[[str], None]
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_NOT_READY = "No available agent to submit job"
_READY_SECONDS, _RETRY_SECONDS = 60.0, 2.0
ON_THE_HEAD = """\
command -v launcher >/dev/null && exec launcher "$@"
process=$$ python=
until [ -n "$python" ] || [ "$process" -le 1 ]; do
    python=$(tr "\\0" "\\n" <"/proc/$process/cmdline" | sed -n "s/^--python_worker_command=\\([^ ]*\\).*/\\1/p")
    process=$(sed -n "s/^PPid:[[:space:]]*//p" "/proc/$process/status")
done
"${python:-python3}" -P -c "import launcher" && exec "${python:-python3}" -P -m launcher "$@"
echo "error: launcher is not on the PATH of this Ray ($PATH), nor in its Python (${python:-not found})." >&2
echo "Hint: install it in the Python that Ray runs on every node, or start Ray with launcher on the PATH." >&2
exit 127"""
"""Runs the launcher that is on the PATH of the cluster's Ray, or the one in the Python with which Ray was started.

A job has the PATH of the shell in which `ray start` was called, which need not have the launcher's environment. The
raylet, which is a parent of the job's processes, has the Python on its command line.
"""
_WILD = re.compile(r"([\\*?\[\]!#])")


@dataclass(frozen=True)
class RayRequest:
    """A job as it is submitted: all that Ray is told, and to which address."""

    address: str
    entrypoint: str
    working_dir: str
    excludes: tuple[str, ...]
    env_vars: Mapping[str, str]
    metadata: Mapping[str, str]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `JobSubmissionClient.submit_job`."""
        environment = {
            "working_dir": self.working_dir,
            "excludes": list(self.excludes),
            "env_vars": dict(self.env_vars),
        }
        return {"entrypoint": self.entrypoint, "runtime_env": environment, "metadata": dict(self.metadata)}

    def to_yaml(self) -> str:
        """The request for people to read."""
        text: str = yaml.safe_dump({"address": self.address, **self.arguments()}, sort_keys=False, allow_unicode=True)
        return text


def ray_request(job: Job, job_file: Path, overrides: Sequence[str], address: str, working_dir: Path) -> RayRequest:
    """The request for a job file that lies under `working_dir`, which is uploaded; both paths are absolute.

    Raises RequestError for what would go wrong on the cluster, or stand where others can read it.
    """
    job_file = Path(os.path.normpath(job_file))
    problems = [*_address_problems(address), *_job_problems(job), *_file_problems(job_file, working_dir)]
    if problems:
        raise RequestError(*problems)
    words = ["launcher", "run", str(job_file.relative_to(working_dir)), *overrides]
    return RayRequest(
        address=address.rstrip("/"),
        entrypoint=shlex.join(["sh", "-c", ON_THE_HEAD, *words]),
        working_dir=str(working_dir),
        excludes=tuple(_excludes(job, working_dir)),
        env_vars=dict(job.cluster.env),
        metadata={"launcher_job": job.name, "launcher_output_dir": job.output_dir},
    )


def dashboard_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The address of Ray's dashboard: what was given, or one that the environment holds. Raises RequestError."""
    for address in (given, *(environment.get(name) for name in ADDRESS_VARIABLES)):
        if address:
            return address
    hint = f"give --address http://HEAD:8265, or set {ADDRESS_VARIABLES[0]}"
    raise RequestError(Problem("to which Ray? There is no address of its dashboard", key="--address", hint=hint))


def submit_to_ray(request: RayRequest, tell: Tell, *, dry_run: bool, parsable: bool, follow: bool) -> int:
    """Submits the request, or shows it; returns the exit status. Raises RunFailed where Ray does not take it."""
    if dry_run:
        tell(request.to_yaml().rstrip())
        return 0
    client = _client(request.address)
    submission_id = _submitted(client, request)
    tell(submission_id if parsable else _told(request, submission_id))
    return _followed(client, request, submission_id, tell) if follow else 0


def _address_problems(address: str) -> list[Problem]:
    parts = urlsplit(address)
    hint = "the address of Ray's dashboard: http://HEAD:8265"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [Problem(f"{address!r} is no address that jobs are submitted to", key="--address", hint=hint)]
    if parts.username or parts.password:
        hint = "Ray's own variables hold its secret: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        return [Problem("a user or password may not stand in an address", key="--address", hint=hint)]
    return []


def _job_problems(job: Job) -> list[Problem]:
    problems = []
    if job.cluster.address == "local" or "://" in job.cluster.address:
        found = f"{job.cluster.address} is not where a run joins the cluster that it was submitted to"
        hint = "leave it out, and give the dashboard's address with --address"
        problems.append(Problem(found, key="cluster.address", hint=hint))
    if not user_path(job.output_dir, "output_dir").is_absolute():
        found = f"{job.output_dir} would lie in the job's working directory, which Ray removes at its end"
        hint = "give an absolute path on storage that all nodes see"
        problems.append(Problem(found, key="output_dir", hint=hint))
    for name in job.cluster.env:
        if is_secret(name):
            found = "looks like a secret, and Ray shows the environment of jobs to all who see its dashboard"
            hint = "set it on the nodes themselves"
            problems.append(Problem(found, key=f"cluster.env.{name}", hint=hint))
    return problems


def _file_problems(job_file: Path, working_dir: Path) -> list[Problem]:
    if job_file.is_relative_to(working_dir):
        return []
    found = f"does not lie under {working_dir}, the folder that is uploaded"
    return [Problem(found, file=str(job_file), hint="submit from a folder that holds the job file")]


def _excludes(job: Job, working_dir: Path) -> list[str]:
    """What runs write is not uploaded, where it lies among the rest. Patterns are those of a .gitignore."""
    written = [uploaded_as(name, working_dir) for name in (job.output_dir, job.data.cache_dir) if name]
    return ["/" + _WILD.sub(r"\\\1", str(folder)) + "/" for folder in written if folder is not None and folder.parts]


def uploaded_as(name: str, working_dir: Path) -> Path | None:
    """Where a path of the job lies in the folder that is uploaded; None where it lies elsewhere."""
    path = Path(os.path.normpath(working_dir / user_path(name)))
    return path.relative_to(working_dir) if path.is_relative_to(working_dir) else None


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without(ADDRESS_VARIABLES):
            return JobSubmissionClient(address)
    except Exception as error:  # Ray has no common kind for what goes wrong here
        raise RunFailed(f"no Ray answers at {address}: {first_line(error)}{_hint(error)}") from None


@contextlib.contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Hides variables of the environment: Ray takes an address that is in them over the one that it is given."""
    hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _submitted(client: Any, request: RayRequest) -> str:
    """The job's id. A Ray that has only just been started takes jobs some seconds later."""
    deadline, told = time.monotonic() + _READY_SECONDS, False
    while True:
        try:
            submission_id: str = client.submit_job(**request.arguments())
            return submission_id
        except Exception as error:  # Ray has no common kind for what goes wrong here
            if _NOT_READY not in str(error) or time.monotonic() > deadline:
                found = f"the Ray at {request.address} did not take the job: {first_line(error)}{_hint(error)}"
                raise RunFailed(found) from None
        if not told:
            # Not to standard output, where --parsable prints the job's id alone.
            wait = f"trying again for up to {_READY_SECONDS:.0f} s"
            print(f"the Ray at {request.address} does not take jobs yet: {wait}", file=sys.stderr)
            told = True
        time.sleep(_RETRY_SECONDS)


def _hint(error: Exception) -> str:
    if type(error).__name__ != "AuthenticationError":
        return ""
    return "\n  set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"


def _told(request: RayRequest, submission_id: str) -> str:
    address = f"--address {shlex.quote(request.address)}"
    return "\n".join(
        [
            f"submitted {submission_id}",
            f"  follow it with   ray job logs --follow {address} {submission_id}",
            f"  run directory    under {request.metadata['launcher_output_dir']}",
        ]
    )


def _followed(client: Any, request: RayRequest, submission_id: str, tell: Tell) -> int:
    """Passes the job's output on to its end; the exit status is its own."""

    async def listen() -> None:
        async for text in client.tail_job_logs(submission_id):
            tell(text.rstrip("\n"))

    try:
        asyncio.run(listen())
        info = client.get_job_info(submission_id)
    except Exception as error:  # Ray has no common kind for what goes wrong here
        found = f"lost sight of {submission_id}, which may well run on: {first_line(error)}"
        raise RunFailed(f"{found}\n  ray job status --address {request.address} {submission_id}") from None
    status = str(info.status.value)
    tell(f"{submission_id}: {status.lower()}")
    return 0 if status == "SUCCEEDED" else info.driver_exit_code or 1
