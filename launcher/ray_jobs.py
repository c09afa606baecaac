"""Submission to an existing Ray cluster through its dashboard, as with `ray job submit`."""

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

Print = Callable[[str], None]
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_NOT_READY = "No available agent to submit job"
_READY_SECONDS, _RETRY_SECONDS = 60.0, 2.0
ENTRYPOINT_SCRIPT = """\
command -v launcher >/dev/null && exec launcher "$@"
process=$$ python=
until [ -n "$python" ] || [ "$process" -le 1 ]; do
    python=$(tr "\\0" "\\n" <"/proc/$process/cmdline" | sed -n "s/^--python_worker_command=\\([^ ]*\\).*/\\1/p")
    process=$(sed -n "s/^PPid:[[:space:]]*//p" "/proc/$process/status")
done
"${python:-python3}" -P -c "import launcher" && exec "${python:-python3}" -P -m launcher "$@"
echo "error: launcher is neither on the PATH of this Ray ($PATH) nor in its Python (${python:-not found})." >&2
echo "Hint: install it in the Python that Ray runs on every node, or start Ray with launcher on the PATH." >&2
exit 127"""
"""Runs the launcher on the PATH of the cluster's Ray, or the one in the Python with which Ray was started.

A job has the PATH of the shell in which `ray start` was called, which may lack the launcher's environment. The
raylet is a parent of the job's processes and has that Python on its command line.
"""
_GITIGNORE_SPECIAL = re.compile(r"([\\*?\[\]!#])")


@dataclass(frozen=True)
class RayRequest:
    """A job as it is submitted: everything that Ray receives, and the address."""

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
    """The request for a job file inside `working_dir`, which is uploaded; both paths are absolute.

    Raises RequestError for what would fail on the cluster or show secrets to others.
    """
    job_file = Path(os.path.normpath(job_file))
    problems = [*_address_problems(address), *_job_problems(job), *_file_problems(job_file, working_dir)]
    if problems:
        raise RequestError(*problems)
    words = ["launcher", "run", str(job_file.relative_to(working_dir)), *overrides]
    return RayRequest(
        address=address.rstrip("/"),
        entrypoint=shlex.join(["sh", "-c", ENTRYPOINT_SCRIPT, *words]),
        working_dir=str(working_dir),
        excludes=tuple(_excludes(job, working_dir)),
        env_vars=dict(job.cluster.env),
        metadata={"launcher_job": job.name, "launcher_output_dir": job.output_dir},
    )


def dashboard_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The address of Ray's dashboard: `given`, or from the environment. Raises RequestError if neither is set."""
    for address in (given, *(environment.get(name) for name in ADDRESS_VARIABLES)):
        if address:
            return address
    hint = f"set --address http://HEAD:8265, or set {ADDRESS_VARIABLES[0]}"
    raise RequestError(Problem("the address of Ray's dashboard is missing", key="--address", hint=hint))


def submit_to_ray(request: RayRequest, output: Print, *, dry_run: bool, parsable: bool, follow: bool) -> int:
    """Submits or shows the request; returns the exit status. Raises RunFailed if Ray rejects it."""
    if dry_run:
        output(request.to_yaml().rstrip())
        return 0
    client = _client(request.address)
    submission_id = _submit(client, request)
    output(submission_id if parsable else _describe_submission(request, submission_id))
    return _follow(client, request, submission_id, output) if follow else 0


def _address_problems(address: str) -> list[Problem]:
    parts = urlsplit(address)
    hint = "use the address of Ray's dashboard: http://HEAD:8265"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [Problem(f"{address!r} is not the address of a Ray dashboard", key="--address", hint=hint)]
    if parts.username or parts.password:
        hint = "give Ray's token in its own variables: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        return [Problem("the address must not contain a user or password", key="--address", hint=hint)]
    return []


def _job_problems(job: Job) -> list[Problem]:
    problems = []
    if job.cluster.address == "local" or "://" in job.cluster.address:
        found = f"{job.cluster.address} is not an address at which a run can join the cluster it was submitted to"
        hint = "leave it out, and set the dashboard's address with --address"
        problems.append(Problem(found, key="cluster.address", hint=hint))
    if not user_path(job.output_dir, "output_dir").is_absolute():
        found = f"{job.output_dir} would be in the job's working directory, which Ray removes at the end of the job"
        hint = "use an absolute path on storage that all nodes see"
        problems.append(Problem(found, key="output_dir", hint=hint))
    for name in job.cluster.env:
        if is_secret(name):
            found = "looks like a secret, but Ray shows the environment of jobs to everyone who sees its dashboard"
            hint = "set it on the nodes themselves"
            problems.append(Problem(found, key=f"cluster.env.{name}", hint=hint))
    return problems


def _file_problems(job_file: Path, working_dir: Path) -> list[Problem]:
    if job_file.is_relative_to(working_dir):
        return []
    found = f"is not inside {working_dir}, the folder that is uploaded"
    return [Problem(found, file=str(job_file), hint="submit from a folder that contains the job file")]


def _excludes(job: Job, working_dir: Path) -> list[str]:
    """Patterns, in the format of .gitignore, for the output of runs, which is not uploaded."""
    written = [path_in_upload(name, working_dir) for name in (job.output_dir, job.data.cache_dir) if name]
    return [
        "/" + _GITIGNORE_SPECIAL.sub(r"\\\1", str(folder)) + "/"
        for folder in written
        if folder is not None and folder.parts
    ]


def path_in_upload(name: str, working_dir: Path) -> Path | None:
    """A path of the job relative to the uploaded folder; None if it is outside."""
    path = Path(os.path.normpath(working_dir / user_path(name)))
    return path.relative_to(working_dir) if path.is_relative_to(working_dir) else None


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _hidden(ADDRESS_VARIABLES):
            return JobSubmissionClient(address)
    except Exception as error:  # Ray's errors here have no common class
        raise RunFailed(f"no Ray answers at {address}: {first_line(error)}{_hint(error)}") from None


@contextlib.contextmanager
def _hidden(variables: Sequence[str]) -> Iterator[None]:
    """Hides environment variables: Ray would prefer an address in them to the given one."""
    hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _submit(client: Any, request: RayRequest) -> str:
    """Submits the job and returns its id. A Ray that has just started accepts jobs only after some seconds."""
    deadline, printed = time.monotonic() + _READY_SECONDS, False
    while True:
        try:
            submission_id: str = client.submit_job(**request.arguments())
            return submission_id
        except Exception as error:  # Ray's errors here have no common class
            if _NOT_READY not in str(error) or time.monotonic() > deadline:
                found = f"the Ray at {request.address} rejected the job: {first_line(error)}{_hint(error)}"
                raise RunFailed(found) from None
        if not printed:
            # To standard error: with --parsable, standard output has only the job id.
            wait = f"trying again for up to {_READY_SECONDS:.0f} s"
            print(f"the Ray at {request.address} does not accept jobs yet: {wait}", file=sys.stderr)
            printed = True
        time.sleep(_RETRY_SECONDS)


def _hint(error: Exception) -> str:
    if type(error).__name__ != "AuthenticationError":
        return ""
    return "\n  set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"


def _describe_submission(request: RayRequest, submission_id: str) -> str:
    address = f"--address {shlex.quote(request.address)}"
    return "\n".join(
        [
            f"submitted {submission_id}",
            f"  output           ray job logs --follow {address} {submission_id}",
            f"  run directory    under {request.metadata['launcher_output_dir']}",
        ]
    )


def _follow(client: Any, request: RayRequest, submission_id: str, output: Print) -> int:
    """Prints the job's output until its end; returns its exit status."""

    async def print_logs() -> None:
        async for text in client.tail_job_logs(submission_id):
            output(text.rstrip("\n"))

    try:
        asyncio.run(print_logs())
        info = client.get_job_info(submission_id)
    except Exception as error:  # Ray's errors here have no common class
        found = f"lost the connection to {submission_id}, which may still be running: {first_line(error)}"
        raise RunFailed(f"{found}\n  ray job status --address {request.address} {submission_id}") from None
    status = str(info.status.value)
    output(f"{submission_id}: {status.lower()}")
    return 0 if status == "SUCCEEDED" else info.driver_exit_code or 1
