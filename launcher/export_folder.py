"""An exported model's folder: what is asked for, where it is written first, and whether it is whole."""

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
    """What the exporting process is asked for. `dtype` None is the one that the run trained in.

    `merge` merges adapters into the pretrained model whatever the job says.
    """

    plan_file: Path
    checkpoint: Path
    folder: Path
    dtype: DType | None = None
    merge: bool = False


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
