"""Checks the files in a model's folder: rejects adapters and quantised weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import Problem, RequestError, first_line

_KEY = "model.name_or_path"
_NUMBERS = ("F64", "F32", "F16", "BF16")
"""The safetensors types of weights that can be trained."""
_LONGEST_HEADER = 100_000_000
"""Of a safetensors file in bytes, from the specification."""


def check_adapter(folder: Path) -> None:
    """Raises RequestError for a folder with an adapter: transformers would add it to the loaded model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    raise RequestError(
        Problem(
            f"{folder} contains an adapter ({file.name}), not only a model",
            key=_KEY,
            hint=f"merge it into its base model first, or name the base model{f', {base}' if base else ''}",
        )
    )


def check_stored_types(folder: Path) -> None:
    """Raises RequestError if a weight is stored in a quantised type, whatever config.json says."""
    for file in sorted(folder.glob("model*.safetensors")):
        found = next((pair for pair in _types(file) if pair[0].endswith(".weight") and pair[1] not in _NUMBERS), None)
        if found:
            raise RequestError(
                Problem(
                    f"{file} stores {found[0]} as {found[1]}: the weights are quantised, and quantised weights cannot "
                    "be trained",
                    key=_KEY,
                    hint="use the original checkpoint, in bfloat16, float16 or float32; model.lora saves memory",
                )
            )


def _types(file: Path) -> Iterator[tuple[str, str]]:
    """(name, type) of each tensor, from the header. Raises RequestError for a file without one."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= _LONGEST_HEADER:
                raise ValueError("it has no header")
            header = json.loads(stream.read(length))
        tensors = {name: str(found["dtype"]) for name, found in header.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        pointer = "run git lfs pull, or " if file.stat().st_size < 1024 else ""
        raise RequestError(
            Problem(
                f"{file} cannot be read as safetensors ({first_line(error)})",
                key=_KEY,
                hint=f"{pointer}copy or download it again",
            )
        ) from None
    yield from tensors.items()
