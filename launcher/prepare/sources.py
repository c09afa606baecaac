"""Where a job's model and data lie: folders, files, globs and hub names. Nothing heavy is imported."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError, nearest

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_TOKENIZER_FILES = (
    "token*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "*.model",
)


@dataclass(frozen=True)
class DataSource:
    """Files of one kind (`builder` reads them), or a hub data set."""

    files: tuple[Path, ...] = ()
    builder: str = ""
    hub_name: str | None = None


def find_data(value: str | Sequence[str], key: str) -> DataSource:
    """The files or the hub data set that a job file's `data.train` or `data.eval` names. Raises RequestError."""
    names = [value] if isinstance(value, str) else list(value)
    files: list[Path] = []
    for name in names:
        found = _expand(name)
        if not found and Path(name).expanduser().is_dir():
            raise RequestError(
                Problem(f"the folder {name} holds no data", key=key, hint=f"wanted: {', '.join(BUILDERS)}")
            )
        if not found and len(names) == 1 and _is_hub_name(name):
            return DataSource(hub_name=name)
        if not found:
            raise RequestError(_missing(name, key))
        files += found
    return DataSource(files=tuple(files), builder=_builder(files, key))


def hub_hint(name: str) -> str:
    """What to do about a hub data set that cannot be had, which may have been meant as a file."""
    return _neighbour(Path(name)) or "give local files, or fetch it first where there is internet"


def _builder(files: Sequence[Path], key: str) -> str:
    unknown = [path for path in files if _kind_suffix(path) not in BUILDERS]
    if unknown:
        message, hint = f"{unknown[0]} is of no kind that can be read", f"valid: {', '.join(BUILDERS)}"
        raise RequestError(Problem(message, key=key, hint=hint))
    kinds = {BUILDERS[_kind_suffix(path)] for path in files}
    if len(kinds) > 1:
        found = ", ".join(sorted({_kind_suffix(path) for path in files}))
        message = f"files of one kind are needed, found {found}"
        raise RequestError(Problem(message, key=key, hint="convert the others, or leave them out"))
    return kinds.pop()


def find_model_folder(name_or_path: str, gguf_file: str | None) -> Path | None:
    """The model's folder where it is one on disk, None for a hub name. Raises RequestError."""
    key, folder = "model.name_or_path", Path(name_or_path).expanduser()
    if folder.is_file():
        raise RequestError(
            Problem(
                f"{folder} is a file; a folder is needed",
                key=key,
                hint="for a GGUF give its folder here and its name in model.gguf_file",
            )
        )
    if not folder.is_dir():
        if _is_hub_name(name_or_path):
            return None
        raise RequestError(Problem(f"there is no folder {folder}", key=key, hint=_neighbour(folder)))
    if gguf_file and not (folder / gguf_file).is_file():
        found = sorted(path.name for path in folder.glob("*.gguf"))
        raise RequestError(
            Problem(
                f"there is no {gguf_file} in {folder}",
                key="model.gguf_file",
                hint=f"found there: {', '.join(found) or 'no .gguf file'}",
            )
        )
    if not gguf_file and not (folder / "config.json").is_file():
        raise RequestError(
            Problem(
                f"{folder} holds no config.json, so it is not a Hugging Face model",
                key=key,
                hint="for a GGUF give model.gguf_file" if any(folder.glob("*.gguf")) else None,
            )
        )
    return folder.resolve()


def file_stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, modification time in ns) of each file: changes when a file does."""
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]


def model_stamp(folder: Path) -> str:
    """A fingerprint of the files of a model folder, by name, size and time."""
    return fingerprint(file_stamps(path for path in folder.iterdir() if path.is_file()))


def tokenizer_fingerprint(folder: Path) -> str:
    """A fingerprint of the content of a folder's tokenizer files."""
    files = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    return fingerprint([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def fingerprint(value: Any) -> str:
    """24 hexadecimal digits that stand for `value` (JSON-plain)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and _kind_suffix(p) in BUILDERS)
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())


def _kind_suffix(path: Path) -> str:
    """The suffix that tells the kind, that of x.jsonl.gz being .jsonl."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst", ".xz", ".bz2")]
    return suffixes[-1].lower() if suffixes else ""


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.match(name)) and _kind_suffix(Path(name)) not in (*BUILDERS, ".gguf", ".yaml")


def _missing(name: str, key: str) -> Problem:
    where = f"(looked from {Path.cwd()})"
    return Problem(f"no file matches {name} {where}", key=key, hint=_neighbour(Path(name)))


def _neighbour(path: Path) -> str | None:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    match = nearest(path.name, names)
    return f"did you mean {parent / match}?" if match else None
