"""Which keys the installed DeepSpeed reads, with types and bounds.

The launcher ships the catalogue of one version, which tests compare with the installed one. For any other version it
runs `build_catalogue` once, in a separate process, and caches the result; if that fails, it uses the shipped catalogue
and warns.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError

SHIPPED = Path(__file__).with_name("shipped_catalogue.json")
"""Made with: python -P -m launcher.ds_config.build_catalogue > launcher/ds_config/shipped_catalogue.json"""

# Code other than DeepSpeedConfig reads these too, and may know more keys.
OPEN_BLOCKS = (
    "data_efficiency",
    "autotuning",
    "expert_parallel",
    "pipeline",
    "tensor_parallel",
    "datastates_ckpt",
)

DEEPSPEED_SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
"""DeepSpeed accepts PyTorch's schedulers too."""


@dataclass(frozen=True)
class Key:
    """One key: its JSON types (empty: any), choices and bounds, and the key that replaces it if deprecated."""

    types: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    deprecated: str | None = None
    alias: str | None = None
    required: bool = False


# Their default is None, which has no type, and DeepSpeed uses their values unconverted. Infinity switches printing off.
_UNTYPED = {
    ("", "steps_per_print"): Key(("int", "float", "null", "inf")),
    ("", "vocabulary_size"): Key(("int", "null")),
    ("activation_checkpointing", "number_checkpoints"): Key(("int", "null")),
}


@dataclass(frozen=True)
class Block:
    """The keys of one {…}. A pydantic model rejects unknown keys and converts text; other blocks do neither."""

    keys: Mapping[str, Key]
    model: bool = False
    open: bool = False

    @property
    def names(self) -> list[str]:
        """The names to suggest: no deprecated names and no aliases."""
        return [name for name, key in self.keys.items() if key.deprecated is None and key.alias is None]


@dataclass(frozen=True)
class Catalogue:
    """What one version of DeepSpeed reads. `blocks` is keyed by dotted path; "" is the top level."""

    deepspeed: str
    blocks: Mapping[str, Block]
    removed: Mapping[str, str]
    optimizers: Mapping[str, Block | None]
    zero_optimizers: frozenset[str]
    schedulers: Mapping[str, Block]
    classes: Mapping[str, Block]
    """The parameters of each class that DeepSpeed may build for one of its optimizer names."""
    warning: str | None = None
    """Why this is the catalogue of another version than the installed one."""

    def optimizer_name(self, written: str) -> str | None:
        """DeepSpeed's name for an optimizer type, or None: its own names in any case, torch's exactly."""
        if written.lower() in self.optimizers:
            return written.lower()
        return written if written in self.optimizers else None


def load_catalogue() -> Catalogue:
    """The catalogue of the installed DeepSpeed: shipped, cached, or from a process that imports it.

    If that process fails, for example after a change in DeepSpeed, the shipped catalogue with a `warning`.

    Raises:
        RequestError: DeepSpeed is not installed.
    """
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        message = "deepspeed is not installed, and the launcher reads the valid keys from it"
        raise RequestError(Problem(message, hint="pip install deepspeed")) from None
    shipped = json.loads(SHIPPED.read_text())
    if (version, _torch_version()) == (shipped["deepspeed"], shipped["torch"]):
        return from_json(shipped)
    try:
        return _parse(json.loads(_cache_file(version).read_text()))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return _queried(version, shipped)


def _queried(version: str, shipped: dict[str, Any]) -> Catalogue:
    """The catalogue of the installed DeepSpeed, which is cached, or the shipped one with a warning."""
    try:
        raw = _query_deepspeed()
        catalogue = _parse(raw)
    except (_QueryFailed, ValueError, LookupError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, _QueryFailed) else f"the catalogue cannot be read ({error!r})"
        warning = (
            f"could not find out which keys DeepSpeed {version} reads: {why}. The JSON is checked against the keys "
            f"of DeepSpeed {shipped['deepspeed']}, which may differ."
        )
        return replace(from_json(shipped), warning=warning)
    _write_cache(version, raw)
    return catalogue


def _parse(raw: dict[str, Any]) -> Catalogue:
    """The catalogue in `raw`. Raises ValueError if it lacks keys that every DeepSpeed has."""
    catalogue = from_json(raw)
    zero = catalogue.blocks.get("zero_optimization", Block({}))
    found = {
        "train_batch_size": "train_batch_size" in catalogue.blocks[""].keys,
        "zero_optimization.stage": "stage" in zero.keys,
        "AdamW": catalogue.optimizers.get("adamw") is not None,
        "WarmupLR": "WarmupLR" in catalogue.schedulers,
    }
    if missing := [name for name, there in found.items() if not there]:
        raise ValueError(f"no {', '.join(missing)}")
    return catalogue


def _torch_version() -> str:
    """PyTorch's version without +cpu or +cu: the catalogue includes PyTorch's optimizers and schedulers."""
    try:
        return metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def from_json(raw: dict[str, Any]) -> Catalogue:
    """The catalogue from the output of `build_catalogue`."""
    blocks = {
        path: Block(_keys(block["keys"], raw["blocks"], path), block["model"], path.startswith(OPEN_BLOCKS))
        for path, block in raw["blocks"].items()
    }
    optimizers = {
        name: Block(_keys(found["params"])) if found["params"] is not None else None
        for name, found in raw["optimizers"].items()
    }
    for (path, name), key in _UNTYPED.items():
        if path in blocks and name in blocks[path].keys:
            blocks[path] = replace(blocks[path], keys={**blocks[path].keys, name: key})
    return Catalogue(
        deepspeed=raw["deepspeed"],
        blocks=blocks,
        removed=raw["removed"],
        optimizers=optimizers,
        zero_optimizers=frozenset(name for name, found in raw["optimizers"].items() if found["zero"]),
        schedulers={name: Block(_scheduler_keys(name, params)) for name, params in raw["schedulers"].items()},
        classes={name: Block(_keys(params)) for name, params in raw["classes"].items()},
    )


def _scheduler_keys(name: str, raw: dict[str, Any]) -> dict[str, Key]:
    """The parameters of a scheduler. Untyped ones of DeepSpeed's schedulers are numbers, or null if optional."""
    keys = _keys(raw)
    if name not in DEEPSPEED_SCHEDULERS:
        return keys
    optional = ("int", "float", "null")
    return {
        name: key if key.types else replace(key, types=optional[:2] if key.required else optional)
        for name, key in keys.items()
    }


def _keys(raw: dict[str, Any], blocks: Mapping[str, Any] | None = None, path: str = "") -> dict[str, Key]:
    keys = {}
    for name, found in raw.items():
        is_block = f"{path}.{name}".lstrip(".") in (blocks or {})
        keys[name] = Key(
            types=_block_types(name) if is_block and not path else tuple(found["types"]),
            choices=tuple(found.get("choices", ())),
            bounds={bound: found[bound] for bound in ("gt", "ge", "lt", "le") if bound in found},
            deprecated=found.get("deprecated"),
            alias=found.get("alias"),
            required=found.get("required", False),
        )
    return keys


def _block_types(name: str) -> tuple[str, ...]:
    """DeepSpeed still accepts the old form "zero_optimization": true."""
    return ("dict", "bool") if name == "zero_optimization" else ("dict",)


def _cache_file(version: str) -> Path:
    """The cache for these versions of DeepSpeed and PyTorch and this text of the builder.

    Raises RuntimeError if the user has no home folder, as in some containers.
    """
    builder = Path(__file__).with_name("build_catalogue.py").read_bytes()
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    digest = hashlib.sha256(builder).hexdigest()[:12]
    return Path(root) / "launcher" / f"deepspeed-{version}-torch-{_torch_version()}-{digest}.json"


class _QueryFailed(Exception):
    """`build_catalogue` failed."""


def _query_deepspeed() -> dict[str, Any]:
    """The output of `build_catalogue`. Raises _QueryFailed."""
    command = [sys.executable, "-P", "-m", "launcher.ds_config.build_catalogue"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise _QueryFailed(last)
    try:
        raw: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        hint = "something prints before the catalogue: look for a sitecustomize"
        raise _QueryFailed(f"the output starts with {done.stdout[:80]!r} ({hint})") from None
    return raw


def _write_cache(version: str, raw: dict[str, Any]) -> None:
    """Writes the cache atomically. If that fails, the next call queries DeepSpeed again."""
    with suppress(OSError, RuntimeError):
        path = _cache_file(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(raw))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
