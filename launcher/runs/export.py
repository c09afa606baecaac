"""Making an export from a checkpoint, in a process of its own: neither Ray nor ranks are needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from launcher.errors import RunFailed, known_code
from launcher.export_folder import DType, ExportRequest
from launcher.files import replace_folder
from launcher.runs.checkpoints import Saved

OnProgress = Callable[[str], None]


def export_saved(
    saved: Saved, folder: Path, on_progress: OnProgress, *, dtype: DType | None = None, merge: bool = False
) -> None:
    """Exports a checkpoint to `folder`, which appears whole, in place of an earlier export. Raises RunFailed.

    Memory: the model in the dtype asked for; the checkpoint's files are mapped, not read at once.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    request = ExportRequest(
        plan_file=saved.plan_file, checkpoint=saved.folder, folder=temporary, dtype=dtype, merge=merge
    )
    try:
        with tempfile.TemporaryFile() as log:
            _ask(request, on_progress, log)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ask(request: ExportRequest, on_progress: OnProgress, log: IO[bytes]) -> None:
    """Has the exporting process write the folder; its libraries' output goes to `log`."""
    # -P: a file launcher.py or datasets.py in the user's folder is not what is to be imported.
    command = [sys.executable, "-P", "-m", "launcher.worker.exporter"]
    # Merging and casting are work for the processor, wherever the ranks were.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.model_dump_json().encode())
            process.stdin.close()
            for line in process.stdout:
                _hear(json.loads(line), on_progress)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        log.seek(0)
        end = "\n".join(f"    {line}" for line in log.read().decode(errors="replace").splitlines()[-10:])
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise RunFailed(f"the exporting process ended with {how}:\n{end}")


def _hear(answer: dict[str, Any], on_progress: OnProgress) -> None:
    if "error" in answer:
        raise RunFailed(answer["error"], code=known_code(answer["code"]))
    on_progress(answer["progress"])
