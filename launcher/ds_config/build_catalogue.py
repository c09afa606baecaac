"""Finds out which keys the installed DeepSpeed reads, and prints them as JSON.

Run as `python -m launcher.ds_config.build_catalogue`. DeepSpeedConfig runs on mappings that record every key that it
looks up, with the default. A marker key that a pydantic model's constructor receives identifies the blocks that are
models; their fields, types and bounds come from the model. Parameters of schedulers and optimizers come from the
signatures of their classes. Importing DeepSpeed takes seconds: `catalogue` runs this in a separate process, once per
version.
"""

from __future__ import annotations

import enum
import inspect
import json
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

MARKER = "__probe__"
NAMES = {bool: "bool", int: "int", float: "float", str: "str", list: "list", tuple: "list", dict: "dict"}
# Read by deepspeed.initialize before it creates a DeepSpeedConfig.
READ_ELSEWHERE = {"sequence_parallel_size": 1, "data_parallel_size": 1}
DEPTH = 5
_ADAM = ("FusedAdam", "DeepSpeedCPUAdam", "torch.optim.AdamW", "torch.optim.Adam")
OPTIMIZER_CLASSES = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lamb": ("FusedLamb",),
    "lion": ("FusedLion", "DeepSpeedCPULion"),
    "adagrad": ("torch.optim.Adagrad", "DeepSpeedCPUAdagrad"),
}
"""The classes that DeepSpeedEngine._configure_basic_optimizer can build for each of DeepSpeed's names."""
_ADAM_SWITCHES = {name: {"types": ["bool"]} for name in ("torch_adam", "adam_w_mode", "fp32_optimizer_states")}
SWITCHES = {"adam": _ADAM_SWITCHES, "adamw": _ADAM_SWITCHES}
"""Parameters that DeepSpeed removes before it calls the class."""
PASSED = {"DeepSpeedCPUAdam": ("adamw_mode",)}
"""Arguments that DeepSpeed passes to a class itself: in the JSON they would be duplicates."""


class Recorder(dict[str, Any]):
    """A mapping that records each key that is looked up, with the default."""

    def __init__(self, data: dict[str, Any], seen: dict[str, Any]) -> None:
        super().__init__(data)
        self.seen = seen

    def get(self, key: str, default: Any = None) -> Any:
        if self.seen.get(key) is None:
            self.seen[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)

    def __copy__(self) -> Recorder:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self


class _Keys:
    """Records `key in mapping.keys()` as a lookup."""

    def __init__(self, owner: Recorder) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self.owner)

    def __len__(self) -> int:
        return len(self.owner)


class Prober:
    """Runs DeepSpeedConfig on marked blocks and collects the keys that it reads."""

    def __init__(self) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
        from deepspeed.runtime.config_utils import DeepSpeedConfigModel

        self.config_class: Any = DeepSpeedConfig
        self.rejection: Any = DeepSpeedConfigError
        self.model_base: Any = DeepSpeedConfigModel
        self.models: dict[str, Any] = {}
        self.blocks: dict[str, dict[str, Any]] = {}
        self.removed: dict[str, str] = {}
        self._patch_models()

    def _patch_models(self) -> None:
        """Makes every model record the block that it was built from."""
        models, construct = self.models, self.model_base.__init__

        def recording(model: Any, strict: bool = False, **data: Any) -> None:
            path = data.pop(MARKER, None)
            if path is not None:
                models[path] = type(model)
            construct(model, strict, **data)

        self.model_base.__init__ = recording

    def run(self) -> None:
        top = self._looked_up("", {})
        for key, default in (top | READ_ELSEWHERE).items():
            self._probe(key, default, 1)
        self.blocks[""] = {
            "keys": {key: _key_of_default(default) for key, default in (top | READ_ELSEWHERE).items()},
            "model": False,
        }
        for path in self.removed:
            block, _, key = path.rpartition(".")
            self.blocks.get(block, {"keys": {}})["keys"].pop(key, None)

    def _probe(self, path: str, default: Any, depth: int) -> None:
        """Finds out whether `path` is a removed key, a model, a block or a plain value."""
        if isinstance(default, (bool, int, float, str)) or depth > DEPTH:
            return
        seen = self._looked_up(path, {MARKER: path})
        seen |= self._looked_up(path, {MARKER: path, "enabled": True})
        if path in self.removed:
            return
        if path in self.models:
            self._add_model(path, self.models[path])
            for key in seen:
                self._looked_up(f"{path}.{key}", {})
        elif seen:
            self.blocks[path] = {"keys": {k: _key_of_default(v) for k, v in seen.items()}, "model": False}
            for key, inner in seen.items():
                self._probe(f"{path}.{key}", inner, depth + 1)

    def _looked_up(self, path: str, block: dict[str, Any]) -> dict[str, Any]:
        """The keys looked up in the block at `path`. If DeepSpeed rejects the key, it is added to `removed`."""
        seen: dict[str, Any] = {}
        config: Any = Recorder(block, seen)
        names = path.split(".") if path else []
        for name in reversed(names[1:]):
            config = Recorder({name: config, "enabled": True}, {})
        top = {names[0]: config} if names else {}
        try:
            self.config_class(Recorder({"train_batch_size": 1} | top, {} if names else seen))
        except self.rejection as error:
            self.removed[path] = str(error)
        except Exception:
            pass  # the probe is not a valid value; lookups before the failure still count
        seen.pop(MARKER, None)
        return seen

    def _add_model(self, path: str, model: Any) -> None:
        keys: dict[str, Any] = {}
        self.blocks[path] = {"keys": keys, "model": True}
        hints = typing.get_type_hints(model)
        for name, info in model.model_fields.items():
            key = _key_of_field(info, hints.get(name, Any))
            keys[info.alias or name] = key
            if info.alias:
                keys[name] = {**key, "alias": info.alias}
            for inner in _models_in(hints.get(name, Any), self.model_base):
                self._add_model(f"{path}.{info.alias or name}", inner)


def _key_of_default(default: Any) -> dict[str, Any]:
    name = NAMES.get(type(default))
    found = {"bool": ["bool"], "int": ["int", "float"], "float": ["int", "float"]}.get(name or "", [name])
    return {"types": [] if name is None else found}


def _key_of_field(info: Any, hint: Any) -> dict[str, Any]:
    key: dict[str, Any] = {"types": sorted(set(_types_in(hint))), "choices": _choices_in(hint)}
    for limit in info.metadata:
        key |= {name: getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}
    extra = info.json_schema_extra
    if isinstance(extra, dict) and extra.get("deprecated"):
        key["deprecated"] = str(extra.get("new_param") or "")
    if info.is_required():
        key["required"] = True
    return key


def _types_in(hint: Any) -> list[str]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _types_in(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [name for part in typing.get_args(hint) for name in _types_in(part)]
    if origin is typing.Literal:
        return [NAMES.get(type(value), "any") for value in typing.get_args(hint)]
    kind = origin or hint
    if kind is type(None):
        return ["null"]
    if not isinstance(kind, type):
        return ["any"]
    return _types_of_class(kind)


def _types_of_class(kind: type) -> list[str]:
    if issubclass(kind, enum.Enum):
        return sorted({NAMES.get(type(member.value), "any") for member in kind})
    if issubclass(kind, pathlib.PurePath):
        return ["str"]
    if hasattr(kind, "model_fields"):
        return ["dict"]
    return [next((name for base, name in NAMES.items() if issubclass(kind, base)), "any")]


def _choices_in(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = [member.value for member in hint]
        return values if all(isinstance(value, (str, int)) for value in values) else []
    return [choice for part in typing.get_args(hint) for choice in _choices_in(part)]


def _models_in(hint: Any, base: type) -> Iterator[Any]:
    if isinstance(hint, type) and issubclass(hint, base):
        yield hint
    for part in typing.get_args(hint):
        yield from _models_in(part, base)


def _parameters(*callables: Callable[..., Any]) -> dict[str, Any]:
    """The JSON params of constructors: all arguments but the first (optimizer or parameters)."""
    found: dict[str, Any] = {}
    for call in callables:
        passed = PASSED.get(call.__name__, ())
        for parameter in list(inspect.signature(call).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in passed:
                continue
            required = parameter.default is parameter.empty
            key = {"types": []} if required else _key_of_default(parameter.default)
            found.setdefault(parameter.name, key | ({"required": True} if required else {}))
    return found


def _schedulers() -> dict[str, Any]:
    import torch
    from deepspeed.runtime import lr_schedules

    theirs = {name: _parameters(getattr(lr_schedules, name)) for name in lr_schedules.VALID_LR_SCHEDULES}
    module = torch.optim.lr_scheduler
    ours = {name: _parameters(kind) for name, kind in _classes(module, module.LRScheduler)}
    return {**ours, **theirs}


def _classes(module: Any, base: type) -> Iterator[tuple[str, Any]]:
    for name, kind in vars(module).items():
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base and not name.startswith("_"):
            yield name, kind


def _optimizers() -> dict[str, Any]:
    """Optimizers by name. `zero`: whether ZeRO accepts it without zero_allow_untested_optimizer.

    `params` are those of all classes that DeepSpeed may build for the name, depending on the rest of the JSON and on
    the device.
    """
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    built = _optimizer_classes()
    found: dict[str, Any] = {name: {"params": None, "zero": name == "muon"} for name in DEEPSPEED_OPTIMIZERS}
    for name, classes in OPTIMIZER_CLASSES.items():
        kinds = [built[one] for one in classes]
        zero = any(kind in ZERO_SUPPORTED_OPTIMIZERS for kind in kinds)
        found[name] = {"params": _parameters(*kinds) | SWITCHES.get(name, {}), "zero": zero}
    for name, kind in _classes(torch.optim, torch.optim.Optimizer):
        if name.lower() not in found:
            found[name] = {"params": _parameters(kind), "zero": kind in ZERO_SUPPORTED_OPTIMIZERS}
    return found


def _optimizer_classes() -> dict[str, Any]:
    """The classes that DeepSpeed may build for its optimizer names, by the name that messages print."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    ours = (FusedAdam, DeepSpeedCPUAdam, FusedLamb, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad)
    theirs = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    return {kind.__name__: kind for kind in ours} | {f"torch.optim.{kind.__name__}": kind for kind in theirs}


def build() -> dict[str, Any]:
    """The catalogue of the installed DeepSpeed, in the format that `catalogue.from_json` reads."""
    import deepspeed
    import torch
    from deepspeed.runtime.config import get_pipeline_config

    prober = Prober()
    prober.run()
    pipeline: dict[str, Any] = {key: {"types": []} for key in get_pipeline_config({})}
    prober.blocks["pipeline"] = {"keys": pipeline, "model": False}
    for name in ("optimizer", "scheduler"):
        prober.blocks[name]["keys"]["params"] = {"types": ["dict"]}
        prober.blocks[name]["keys"]["type"] = {"types": ["str"]}
        prober.blocks.pop(f"{name}.params", None)
    return {
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__.partition("+")[0],
        "blocks": prober.blocks,
        "removed": prober.removed,
        "optimizers": _optimizers(),
        "classes": {kind: _parameters(call) for kind, call in _optimizer_classes().items()},
        "schedulers": _schedulers(),
    }


def main() -> None:
    """Prints the catalogue to standard output; what DeepSpeed prints goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    json.dump(build(), out, default=str, indent=1)
    out.write("\n")


if __name__ == "__main__":
    main()
