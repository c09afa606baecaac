"""Finds a job's model and data: folders, files, globs and hub names. No heavy imports."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError, nearest
from launcher.job.schema import DataSection
from launcher.job.user_path import user_path

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
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
    """Files of one kind (read by `builder`), a hub data set with a `config`, or a folder from save_to_disk."""

    files: tuple[Path, ...] = ()
    builder: str = ""
    hub_name: str | None = None
    config: str | None = None
    saved: Path | None = None

    @property
    def has_splits(self) -> bool:
        return self.hub_name is not None or (self.saved is not None and saved_splits(self.saved) is not None)


def find_data(value: str | Sequence[str], key: str) -> DataSource:
    """The files or the hub data set that a job file's `data.train` or `data.eval` names. Raises RequestError."""
    names = [value] if isinstance(value, str) else list(value)
    files: list[Path] = []
    for name in names:
        folder = user_path(name, key)
        if is_saved(folder):
            if len(names) > 1:
                message = f"{name} is a folder from save_to_disk, which cannot be combined with other files"
                raise RequestError(
                    Problem(message, key=key, hint="use only this folder, or write the data with to_parquet")
                )
            return DataSource(saved=folder)
        found = _expand(name)
        if not found and folder.is_dir():
            raise RequestError(_no_data_in(folder, name, key))
        if not found and len(names) == 1 and _is_hub_name(name):
            return DataSource(hub_name=name)
        if not found:
            raise RequestError(_missing(name, key))
        files += found
    return DataSource(files=tuple(files), builder=_builder(files, key))


def find_split_data(section: DataSection) -> tuple[DataSource, DataSource | float | None]:
    """The job's (train, eval), with the configuration of a hub data set.

    Raises RequestError, also for keys without effect.
    """
    train = find_data(section.train, "data.train")
    given = section.eval
    held_out = find_data(given, "data.eval") if isinstance(given, str | list) else given
    problems = list(_keys_without_effect(section, train, held_out))
    if problems:
        raise RequestError(*problems)
    if section.config is None:
        return train, held_out
    if isinstance(held_out, DataSource) and held_out.hub_name and train.hub_name in (None, held_out.hub_name):
        held_out = replace(held_out, config=section.config)
    return replace(train, config=section.config) if train.hub_name else train, held_out


def _keys_without_effect(
    section: DataSection, train: DataSource, held_out: DataSource | float | None
) -> Iterator[Problem]:
    other = held_out if isinstance(held_out, DataSource) else DataSource()
    if section.config is not None and not (train.hub_name or other.hub_name):
        message = "only hub data sets have configurations, and the job uses none"
        yield Problem(message, key="data.config", hint="remove it")
    if section.eval_split is not None and not other.has_splits:
        example = train.hub_name or train.saved if train.has_splits else "NAME, or remove eval_split"
        message = "data.eval is not a hub data set, so it has no splits"
        yield Problem(message, key="data.eval_split", hint=f"data.eval: {example}")
    if section.split != "train" and not (train.has_splits or other.has_splits):
        message = f"{section.split} names a split of a hub data set, but the data are files without splits"
        yield Problem(message, key="data.split", hint="remove it")


def is_saved(folder: Path) -> bool:
    """Whether datasets' save_to_disk wrote the folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def saved_splits(folder: Path) -> list[str] | None:
    """The names of the splits in a folder from save_to_disk; None if it is a single data set."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return sorted(path.name for path in folder.iterdir() if is_saved(path))
    return [str(name) for name in splits]


def hub_hint(name: str) -> str:
    """The hint for a hub data set that cannot be downloaded, whose name may be a misspelt file."""
    return _similar_name(Path(name)) or "use local files, or download it first on a machine with internet access"


def _builder(files: Sequence[Path], key: str) -> str:
    unknown = [path for path in files if _kind_suffix(path) not in BUILDERS]
    if unknown:
        message, hint = f"{unknown[0]} has an unsupported file type", f"valid: {', '.join(BUILDERS)}"
        raise RequestError(Problem(message, key=key, hint=hint))
    kinds = {BUILDERS[_kind_suffix(path)] for path in files}
    if len(kinds) > 1:
        found = ", ".join(sorted({_kind_suffix(path) for path in files}))
        message = f"all files must have the same type, found {found}"
        raise RequestError(Problem(message, key=key, hint="convert or exclude some of them"))
    return kinds.pop()


def find_model_folder(name_or_path: str, gguf_file: str | None) -> Path | None:
    """The model's folder if it is on disk; None for a hub name. Raises RequestError."""
    key, folder = "model.name_or_path", user_path(name_or_path, "model.name_or_path")
    if folder.is_file():
        raise RequestError(
            Problem(
                f"{folder} is a file, not a folder",
                key=key,
                hint="for a GGUF write its folder here and its name in model.gguf_file",
            )
        )
    if not folder.is_dir():
        if _is_hub_name(name_or_path):
            return None
        raise RequestError(Problem(f"folder not found: {folder}", key=key, hint=_similar_name(folder)))
    if gguf_file and not (folder / gguf_file).is_file():
        found = sorted(path.name for path in folder.glob("*.gguf"))
        raise RequestError(
            Problem(
                f"{gguf_file} not found in {folder}",
                key="model.gguf_file",
                hint=f"the folder has: {', '.join(found) or 'no .gguf file'}",
            )
        )
    if not gguf_file and not (folder / "config.json").is_file():
        raise RequestError(
            Problem(
                f"{folder} has no config.json, so it is not a Hugging Face model",
                key=key,
                hint="for a GGUF set model.gguf_file" if any(folder.glob("*.gguf")) else None,
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
    """A hash of `value` (JSON types), as 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _expand(name: str) -> list[Path]:
    path = user_path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and _is_data(p))
    found = (Path(match) for match in glob.glob(str(path), recursive=True))
    return sorted(match for match in found if match.is_file() and not _is_hidden(match, path))


def _is_data(path: Path) -> bool:
    return _kind_suffix(path) in BUILDERS and not _is_hidden(path, path.parent)


def _is_hidden(path: Path, named: Path) -> bool:
    """Whether a path is hidden (._x of macOS, .x.swp of vim, .ipynb_checkpoints) and not named by the job."""
    named_parts = [part for part in named.parts if part.startswith(".")]
    hidden = [part for part in path.parts if part.startswith(".")]
    return not all(any(fnmatch.fnmatchcase(part, pattern) for pattern in named_parts) for part in hidden)


def _no_data_in(folder: Path, name: str, key: str) -> Problem:
    """The error for a folder without data, with its subfolders that have data."""
    below = sorted({path.parent for path in folder.glob("*/*") if path.is_file() and _is_data(path)})
    below = [path for path in below if not path.name.startswith(".") and not is_saved(path)]
    saved = sorted(path for path in folder.iterdir() if path.is_dir() and is_saved(path))
    if below or saved:
        hint = "use one of its subfolders: " + ", ".join(str(path) for path in [*saved, *below][:5])
        if len(below) > 1:
            hint += (
                f"; for all files, use {name.rstrip('/')}/*/*{_kind_suffix(next(filter(_is_data, below[0].iterdir())))}"
            )
    else:
        hint = f"supported: {', '.join(BUILDERS)}"
    return Problem(f"the folder {name} contains no data", key=key, hint=hint)


def _kind_suffix(path: Path) -> str:
    """The suffix of the file type; .jsonl for x.jsonl.gz."""
    suffixes = [s for s in path.suffixes if s.lower() not in (".gz", ".zst", ".xz", ".bz2")]
    return suffixes[-1].lower() if suffixes else ""


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.match(name)) and _kind_suffix(Path(name)) not in (*BUILDERS, ".gguf", ".yaml")


def _missing(name: str, key: str) -> Problem:
    where = f"(working directory {Path.cwd()})"
    return Problem(f"no file matches {name} {where}", key=key, hint=_similar_name(Path(name)))


def _similar_name(path: Path) -> str | None:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    match = nearest(path.name, [name for name in names if name != path.name])
    return f"did you mean {parent / match}?" if match else None
