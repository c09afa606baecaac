"""An exported model's folder: the request for an export, its temporary folder, and the check of the result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel

from launcher.files import read_json

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
_INDEX = "model.safetensors.index.json"


class ExportRequest(BaseModel):
    """The request to the exporting process. `dtype` None is the dtype of the run's training.

    `merge` merges adapters into the pretrained model, even if the job does not.
    """

    plan_file: Path
    checkpoint: Path
    folder: Path
    dtype: DType | None = None
    merge: bool = False


def export_temporary(folder: Path) -> Path:
    """The folder to which a run's ranks write the export before it is renamed to `folder`."""
    return folder.with_name(f".{folder.name}.tmp")


def export_fault(folder: Path) -> str | None:
    """Why a folder is not a complete export, as text; None if it is. Only the sizes of the weights are read."""
    if not folder.is_dir():
        return "it does not exist"
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    if not adapter.is_file() and not config.is_file():
        return "it has neither a config.json nor an adapter_config.json"
    names = ["adapter_model.safetensors"] if adapter.is_file() else ["model.safetensors"]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set((read_json(folder / _INDEX) or {})["weight_map"].values()))
        except (OSError, KeyError, TypeError, AttributeError):
            return f"{_INDEX} is damaged"
    return next((fault for name in names if (fault := _weights_fault(folder / name))), None)


def _weights_fault(file: Path) -> str | None:
    """A safetensors file starts with the length of its header, which contains the end of each tensor."""
    try:
        with file.open("rb") as weights:
            length = int.from_bytes(weights.read(8), "little")
            size = os.fstat(weights.fileno()).st_size
            header = json.loads(weights.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        complete = size == 8 + length + max(ends, default=0)
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{file.name} is damaged"
    return None if complete else f"{file.name} is incomplete"
