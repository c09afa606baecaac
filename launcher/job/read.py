"""Reads a job file: YAML with the line of every key, overrides, and errors with the line and a hint."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.errors import Problem, RequestError, nearest
from launcher.job.schema import INVALID_URL, JOB_NAME_PATTERN, LENGTHS, NAME_PATTERN, AnyJob, Job, ScriptJob

KeyPath = tuple[str, ...]
Lines = dict[KeyPath, int]
COMMAND_LINE = 0
_SECTION_SHOWN = 6
_LARGEST = sys.float_info.max
_MOST_VALUES = 100_000
"""In one file, counting the values of an anchor once per alias: a few lines of nested aliases expand to billions."""
_ALIASES = "an alias (*name) repeats all values of its anchor (&name)"
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without base-60 numbers: a time such as 24:00:00 stays text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag in _NUMBERS and ":" in value else tag

    def construct_object(self, node: Any, deep: Any = False) -> Any:
        """The value of a node. PyYAML fails with internal errors on an explicit tag that does not fit, as `!!int x`."""
        try:
            value = super().construct_object(node, deep)
        except (LookupError, AttributeError):
            message = f"the value does not fit its tag !!{node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return value


def read_data(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Lines]:
    """The content of a job file with the overrides applied, and the line of each key. Raises RequestError."""
    data, lines = load_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise RequestError(
            Problem(
                f"a job file must be a mapping of sections, found {_kind(data)}",
                file=str(path),
                hint="`launcher init` writes one",
            )
        )
    data.setdefault("name", _name_from(path))
    for key in apply_overrides(data, overrides):
        _move_to_command_line(lines, key)
    return data, lines


def validate_job(data: dict[str, Any], lines: Lines | None = None, origin: str = "the job") -> AnyJob:
    """`data` as a Job, or a ScriptJob if it has a script section. Raises RequestError with one Problem per error."""
    kind = ScriptJob if "script" in data else Job
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestError(*_problems(error, data, lines or {}, origin, kind)) from None


def explicit_keys(job: AnyJob) -> frozenset[str]:
    """Dotted names of the keys that the user set to a value other than 'auto' and null."""
    return frozenset(_explicit(job, ()))


def load_yaml(text: str, origin: str) -> tuple[Any, Lines]:
    """Plain data (as yaml.safe_load) and the line of each key. Duplicate keys and broken YAML are RequestErrors."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: Lines = {}
        for count, (path, line) in enumerate(_key_lines(node, (), origin)):
            if count == _MOST_VALUES:
                raise RequestError(Problem(f"more than {_MOST_VALUES:,} values", file=origin, hint=_ALIASES))
            lines[path] = line
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        raise RequestError(_marked(error, origin)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"YAML does not allow the character U+{error.character:04X}"
        raise RequestError(Problem(message, file=origin, line=line, hint="remove it")) from None
    except RecursionError:
        raise RequestError(
            Problem("not valid YAML: a value contains itself, or the nesting is too deep", file=origin)
        ) from None
    except ValueError as error:  # an invalid date or number, such as 2026-13-45
        hint = "put quotes around a value that is text"
        raise RequestError(Problem(f"invalid value: {error}", file=origin, hint=hint)) from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[KeyPath]:
    """Sets each `section.key=value` in `data`; returns the keys' paths.

    A run has one length: an override of it replaces the length in the job file.
    """
    keys = [apply_override(data, override) for override in overrides]
    train = data.get("train")
    lengths = {name for name in LENGTHS if ("train", name) in keys}
    if isinstance(train, dict) and any(train.get(name) is not None for name in lengths):
        for name in set(LENGTHS) - lengths:
            train.pop(name, None)
    return keys


def apply_override(data: dict[str, Any], override: str) -> KeyPath:
    """Sets `section.key=value` (the value read as YAML) in `data`; returns the key's path."""
    key = override_key(override)
    name, _, text = override.partition("=")
    try:
        value, _ = load_yaml(text, name)
    except RequestError:
        raise RequestError(
            Problem(f"the value of the override {override!r} is not valid YAML", hint="put quotes around it")
        ) from None
    section = data
    for part in key[:-1]:
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        elif not isinstance(inner, dict):
            message = f"{part} is {_show(inner)} in the job file, not a mapping, so {name} cannot be set"
            raise RequestError(Problem(message, key=name, hint=f"override {part} as a whole"))
        section = inner
    section[key[-1]] = value
    return key


def override_key(override: str) -> KeyPath:
    """The key of `section.key=value`."""
    name, equals, _ = override.partition("=")
    key = tuple(name.split("."))
    if not equals or not all(key):
        message = f"an override must be section.key=value, found {override!r}"
        raise RequestError(Problem(message, hint="for example train.max_steps=20"))
    return key


def read_text(path: Path) -> str:
    """The text of a job file. Raises RequestError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(
            Problem("job file not found", file=str(path), hint="`launcher init` writes one to start from")
        ) from None
    except IsADirectoryError:
        raise RequestError(Problem("this is a folder, not a job file", file=str(path))) from None
    except UnicodeDecodeError as error:
        raise RequestError(Problem(f"not UTF-8 text (byte {error.start})", file=str(path))) from None
    except OSError as error:
        raise RequestError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")[:64] or "job"


def _key_lines(node: yaml.Node, at: KeyPath, origin: str) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise RequestError(
                    Problem(
                        f"duplicate key {key}, first set on line {seen[key]}",
                        file=origin,
                        line=line,
                        hint="keep one of the two",
                    )
                )
            seen[key] = line
            yield (*at, key), line
            yield from _key_lines(value_node, (*at, key), origin)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*at, str(index)), item.start_mark.line + 1
            yield from _key_lines(item, (*at, str(index)), origin)


def _marked(error: yaml.MarkedYAMLError, origin: str) -> Problem:
    details = ", ".join(part for part in (error.context, error.problem) if part)
    return Problem(
        f"not valid YAML: {details}",
        file=origin,
        line=error.problem_mark.line + 1 if error.problem_mark else None,
        hint="check the indentation (spaces, not tabs), colons and quotes on this line and the line before",
    )


def _move_to_command_line(lines: Lines, key: KeyPath) -> None:
    """Gives an overridden key, and no key inside it, the line COMMAND_LINE."""
    for path in [path for path in lines if path[: len(key)] == key]:
        del lines[path]
    lines[key] = COMMAND_LINE


def location_of(path: KeyPath, lines: Lines, origin: str) -> tuple[str, int | None]:
    """The file and line of a key, or of the section around it; ("command line", None) for an overridden key."""
    line = next((lines[at] for at in (path, path[:-1]) if at in lines), None)
    if line is None and path:
        # A section that only overrides have.
        inside = {line for at, line in lines.items() if at[: len(path)] == path}
        line = COMMAND_LINE if inside == {COMMAND_LINE} else None
    return ("command line", None) if line == COMMAND_LINE else (origin, line)


def _problems(error: ValidationError, data: Any, lines: Lines, origin: str, kind: type[AnyJob]) -> list[Problem]:
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        path = _path_in(data, detail)
        grouped.setdefault(path, []).append(detail)
    return [_problem(path, details, lines, origin, kind) for path, details in grouped.items()]


def _path_in(data: Any, detail: ErrorDetails) -> KeyPath:
    """The key path of an error as in the job file, without pydantic's names for the branches of a union."""
    path: list[str] = []
    extra = detail["type"] in ("missing", "extra_forbidden")
    for index, part in enumerate(detail["loc"]):
        last = index == len(detail["loc"]) - 1
        if isinstance(data, dict) and (part in data or (extra and last)):
            path.append(str(part))
            data = data.get(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            path.append(str(part))
            data = data[part]
    return tuple(path)


def _problem(path: KeyPath, details: list[ErrorDetails], lines: Lines, origin: str, kind: type[AnyJob]) -> Problem:
    key, detail = ".".join(part if part.isprintable() else repr(part) for part in path), details[0]
    file, line = location_of(path, lines, origin)
    problem = partial(Problem, file=file, line=line, key=key or None)
    if detail["type"] == "extra_forbidden":
        return problem("unknown key", hint=_hint_unknown(path, kind))
    if detail["type"] == "missing":
        if path in _REQUIRED_WITHOUT_SCRIPT:
            return problem("this key is required", hint=f"{_describe(path, kind)}. {_SCRIPT}")
        short = isinstance(detail["loc"][-1], int)
        return problem("too few values" if short else "this key is required", hint=_describe(path, kind))
    if detail["type"] == INVALID_URL:
        return problem(detail["ctx"]["reason"], hint=detail["ctx"]["hint"])
    expected = " or ".join(dict.fromkeys(_expected(d) for d in details)).replace(" or must be ", " or ")
    if detail["type"] == "value_error":
        return problem(expected)
    return problem(
        f"{expected}, found {_show(detail['input'])}", hint=_nearest_choice(details) or _describe(path, kind)
    )


def _nearest_choice(details: list[ErrorDetails]) -> str | None:
    """A hint with the choice nearest to a misspelt one."""
    for detail in details:
        if detail["type"] == "literal_error" and isinstance(detail["input"], str):
            match = nearest(detail["input"], re.findall("'([^']*)'", detail["ctx"]["expected"]))
            return f"did you mean {match}?" if match else None
    return None


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return "must be a whole number"
    if kind in ("float_type", "float_parsing"):
        return "must be a number"
    if kind == "string_type":
        return "must be text"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"must match {context['pattern']}")
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    if kind in ("model_type", "dict_type"):
        return "must be a mapping of keys"
    if kind == "invalid_key":
        return "a key must be text"
    if kind == "list_type":
        return "must be a list"
    if kind == "value_error":
        return str(context["error"])
    return detail["msg"].replace("Input should be", "must be")


_REQUIRED_WITHOUT_SCRIPT = (("model",), ("data",))
_SCRIPT = "To run your own script, add a section `script` instead"
_PATTERNS = {
    NAME_PATTERN: "must be text without line breaks and control characters",
    JOB_NAME_PATTERN: "must be letters, digits, '.', '_' and '-', at most 64, the first a letter or digit",
}


def _hint_unknown(path: KeyPath, kind: type[AnyJob]) -> str:
    section = _section_at(path[:-1], kind)
    if section is None:
        return "remove it"
    names = list(section.model_fields)
    elsewhere = [f"{name}.{path[-1]}" for name, inner in _sections(kind) if path[-1] in inner.model_fields]
    if elsewhere:
        return f"it belongs in {' or '.join(elsewhere)}"
    head, dot, rest = path[-1].partition(".")
    if dot and head in names:
        return f"in the file, write {rest} under {head}; dotted keys are only for the command line"
    match = nearest(path[-1], names)
    if match:
        return f"did you mean {match}?"
    return f"valid keys: {', '.join(names)}"


def _describe(path: KeyPath, kind: type[AnyJob]) -> str | None:
    section = _section_at(path[:-1], kind)
    info = section.model_fields.get(path[-1]) if section and path else None
    if info is None or info.description:
        return info.description if info else None
    inner = _model_in(info.annotation)
    return f"a section with the keys {', '.join(list(inner.model_fields)[:_SECTION_SHOWN])}, …" if inner else None


def _sections(kind: type[AnyJob]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield name, info.annotation


def _section_at(path: KeyPath, kind: type[AnyJob]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = kind
    for part in path:
        if part.isdigit():
            continue
        info = section.model_fields.get(part) if section else None
        section = _model_in(info.annotation) if info else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if model := _model_in(inner):
            return model
    return None


def _explicit(section: BaseModel, at: KeyPath) -> Iterator[str]:
    for name in section.model_fields_set:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _explicit(value, (*at, name))
        elif value is not None and value != "auto":
            yield ".".join((*at, name))


def _show(value: Any) -> str:
    """`value` as in YAML, at most 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _kind(value: Any) -> str:
    return "nothing" if value is None else {"str": "text", "list": "a list"}.get(type(value).__name__, _show(value))
