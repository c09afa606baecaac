"""Exporting a checkpoint in a separate process, without Ray or ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from launcher.errors import RunFailed, known_code
from launcher.export_folder import DType, ExportRequest
from launcher.files import output_mode, replace_folder
from launcher.runs.checkpoints import SavedCheckpoint

OnProgress = Callable[[str], None]


def export_saved(
    saved: SavedCheckpoint, folder: Path, on_progress: OnProgress, *, dtype: DType | None = None, merge: bool = False
) -> None:
    """Exports a checkpoint to `folder`, which atomically replaces an earlier export. Raises RunFailed.

    Memory: the model in the exported dtype. The checkpoint's files are memory-mapped.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    request = ExportRequest(
        plan_file=saved.plan_file, checkpoint=saved.folder, folder=temporary, dtype=dtype, merge=merge
    )
    try:
        with output_mode(saved.plan.job.output_mode), tempfile.TemporaryFile() as log:
            # tempfile.mkdtemp would make a folder that the group can never read.
            temporary.mkdir(parents=True)
            _run_exporter(request, on_progress, log)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_exporter(request: ExportRequest, on_progress: OnProgress, log: IO[bytes]) -> None:
    """Runs the exporter, which writes the folder; output of its libraries goes to `log`. Raises RunFailed."""
    # -P: do not import a launcher.py or datasets.py of the user's folder.
    command = [sys.executable, "-P", "-m", "launcher.worker.exporter"]
    # Merging and casting need no GPU.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.model_dump_json().encode())
            process.stdin.close()
            for line in process.stdout:
                _handle_message(json.loads(line), on_progress)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        log.seek(0)
        tail = "\n".join(f"    {line}" for line in log.read().decode(errors="replace").splitlines()[-10:])
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise RunFailed(f"the export process ended with {how}:\n{tail}")


def _handle_message(message: dict[str, Any], on_progress: OnProgress) -> None:
    if "error" in message:
        raise RunFailed(message["error"], code=known_code(message["code"]))
    on_progress(message["progress"])
