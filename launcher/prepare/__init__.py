"""Measures what a plan needs: the model's sizes, the data (tokenised once, cached) and the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from launcher.errors import FailureCode, LauncherError, Problem, RequestError, known_code
from launcher.job import AnyJob, Job
from launcher.job.schema import ModelSection
from launcher.job.user_path import user_path
from launcher.plan.facts import ModelFacts
from launcher.prepare.request import ModelRequest, Prepared, Request, cached, cached_model

OnProgress = Callable[[dict[str, object]], None]
__all__ = ["Prepared", "cache_folder", "prepare", "prepare_model"]


def cache_folder(job: AnyJob) -> Path:
    """The folder for measurements and tokenised data of a job: on storage that all nodes see."""
    named = job.data.cache_dir if job.data else None
    return user_path(named or Path(job.output_dir) / ".cache").resolve()


def prepare(job: Job, on_progress: OnProgress, log: IO[bytes] | int = subprocess.DEVNULL) -> Prepared:
    """The measurements of the job's model and data: from the cache in milliseconds, else from a separate process.

    `on_progress` receives {"message": …, "done": …, "total": …}; the output of libraries goes to `log`. Raises
    RequestError, or LauncherError if the process fails.
    """
    request = Request(job=job, cache=cache_folder(job))
    return cached(request) or Prepared.model_validate(_run_process(request, on_progress, log))


def prepare_model(
    section: ModelSection, cache: Path, on_progress: OnProgress, log: IO[bytes] | int = subprocess.DEVNULL
) -> ModelFacts:
    """The measurements of a model without data; otherwise as `prepare`."""
    request = ModelRequest(model=section, cache=cache)
    return cached_model(request) or ModelFacts.model_validate(_run_process(request, on_progress, log))


def _run_process(request: BaseModel, on_progress: OnProgress, log: IO[bytes] | int) -> object:
    """Runs the measuring process and returns its result."""
    # -P: do not import a launcher.py or datasets.py from the user's folder.
    command = [sys.executable, "-P", "-m", "launcher.prepare"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.model_dump_json().encode())
            process.stdin.close()
            for line in process.stdout:
                if (prepared := _answer(json.loads(line), on_progress)) is not None:
                    return prepared
        except BaseException:
            process.kill()
            raise
    message = f"the measuring process ended with status {process.returncode} and without a result"
    raise LauncherError(message, code=FailureCode.PREPARE_FAILED)


def _answer(message: dict[str, object], on_progress: OnProgress) -> object | None:
    if "progress" in message:
        on_progress(message["progress"])  # type: ignore[arg-type]
        return None
    if "problems" in message:
        raise RequestError(*(Problem(**problem) for problem in message["problems"]))  # type: ignore[attr-defined]
    if "failed" in message:
        hint = "the cache is in output_dir/.cache, or in data.cache_dir if set"
        raise LauncherError(f"measuring failed: {message['failed']}\n  {hint}", code=known_code(message["code"]))
    if "fault" in message:
        raise LauncherError(f"measuring failed:\n{message['fault']}", code=FailureCode.PREPARE_FAILED)
    return message["prepared"]
