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
from typing import IO, Any, Literal, get_args

from pydantic import BaseModel

from launcher.errors import RunFailed, known_code
from launcher.files import read_json, replace_folder
from launcher.saved import Saved

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
OnProgress = Callable[[str], None]
_INDEX = "model.safetensors.index.json"


class ExportRequest(BaseModel):
    """What the exporting process is asked for. `dtype` None is the one that the run trained in.

    `merge` merges adapters into the pretrained model whatever the job says.
    """

    plan_file: Path
    checkpoint: Path
    folder: Path
    dtype: DType | None = None
    merge: bool = False


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


def export_temporary(folder: Path) -> Path:
    """Where a run's own ranks write the export that becomes `folder`."""
    return folder.with_name(f".{folder.name}.tmp")


def export_fault(folder: Path) -> str | None:
    """Why a folder is not a whole export, in words; None if it is one. Weights are not read, only their sizes."""
    if not folder.is_dir():
        return "it does not exist"
    adapter, whole = folder / "adapter_config.json", folder / "config.json"
    if not adapter.is_file() and not whole.is_file():
        return "it has neither a config.json nor an adapter_config.json"
    names = ["adapter_model.safetensors"] if adapter.is_file() else ["model.safetensors"]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set((read_json(folder / _INDEX) or {})["weight_map"].values()))
        except (OSError, KeyError, TypeError, AttributeError):
            return f"{_INDEX} is damaged"
    return next((fault for name in names if (fault := _weights_fault(folder / name))), None)


def _weights_fault(file: Path) -> str | None:
    """A safetensors file begins with the length of its header, which names where each tensor ends."""
    try:
        with file.open("rb") as weights:
            length = int.from_bytes(weights.read(8), "little")
            size = os.fstat(weights.fileno()).st_size
            header = json.loads(weights.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{file.name} is damaged"
    return None if whole else f"{file.name} is not whole"


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
