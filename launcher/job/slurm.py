"""Slurm's grammar: the valid values of each key of a job file's slurm section, as in sbatch(1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Grammar:
    """The pattern that a whole text must match, and its description in error messages."""

    pattern: str
    description: str

    def check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise PydanticCustomError("slurm_grammar", "must be {description}", {"description": self.description})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}


def _number_as_text(value: Any) -> Any:
    """Converts the numbers that YAML reads in `time: 90`, `mem: 64000` and `array: 5` to text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# No control characters, Unicode line separators or surrogates: some programs end a line there, or cannot encode them.
_PLAIN = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\][A-Za-z0-9_.-]*)*"
_JOB = r"[0-9]+(?:_(?:[0-9]+|\*))?"
_AFTER = rf"after:{_JOB}(?:\+[0-9]+)?(?::{_JOB}(?:\+[0-9]+)?)*"
_AFTER_END = rf"after(?:any|burstbuffer|corr|notok|ok):{_JOB}(?::{_JOB})*"
_CONDITION = rf"(?:{_AFTER}|{_AFTER_END}|singleton)"
_RANGE = r"[0-9]+(?:-[0-9]+(?::[1-9][0-9]*)?)?"
_RESOURCE = r"[A-Za-z0-9_]+(?::[A-Za-z0-9_][A-Za-z0-9_.-]*)?(?::[0-9]{1,9}[KkMmGgTtPp]?)?"
_TIME = r"[0-9]{1,9}(?::[0-9]{1,2}){0,2}|[0-9]{1,9}-[0-9]{1,2}(?::[0-9]{1,2}){0,2}|UNLIMITED|INFINITE"

Word = Annotated[str, Grammar(_WORD, "a name of letters, digits and _ . @ + -, not starting with . @ + or -")]
Words = Annotated[str, Grammar(rf"{_WORD}(?:,{_WORD})*", "names of letters, digits and _ . @ + -, separated by commas")]
Time = Annotated[
    str,
    BeforeValidator(_number_as_text),
    Grammar(_TIME, "a Slurm time, such as '90' (minutes), '24:00:00', '2-12' or '2-12:30:00'"),
]
Memory = Annotated[
    str, BeforeValidator(_number_as_text), Grammar(r"[0-9]+[KkMmGgTt]?", "a number with K, M, G or T, such as 64G")
]
Resources = Annotated[
    str, Grammar(rf"{_RESOURCE}(?:,{_RESOURCE})*", "name[[:type]:count], separated by commas, such as gpu:h100:8")
]
Features = Annotated[
    str,
    Grammar(
        r"[A-Za-z0-9_\[(!][A-Za-z0-9_.=+:@~\[\]()&|*,!-]*",
        "features joined with & and |, such as a100&nvlink or [rack1|rack2]",
    ),
]
Hosts = Annotated[str, Grammar(rf"{_HOST}(?:,{_HOST})*", "node names such as node1,gpu[03-08,12]")]
Dependency = Annotated[
    str,
    Grammar(
        rf"{_CONDITION}(?:(?:,{_CONDITION})*|(?:\?{_CONDITION})*)",
        "type:job[:job…], all separated by ',' or all by '?', such as afterok:123:124,singleton",
    ),
]
Array = Annotated[
    str,
    BeforeValidator(_number_as_text),
    Grammar(rf"{_RANGE}(?:,{_RANGE})*(?:%[1-9][0-9]*)?", "indices such as 0-15, 0,6,16-32, 0-15:4 or 0-15%4"),
]
JobKey = Annotated[str, Grammar(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*", "a key such as train.seed")]
Module = Annotated[
    str, Grammar(r"[A-Za-z0-9_][A-Za-z0-9_.+/:@-]*", "a module name such as cuda/12.4, not starting with a dash")
]
Address = Annotated[str, Grammar(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:@[A-Za-z0-9.-]+)?", "a user name or a mail address")]
Mail = Literal[
    "NONE",
    "BEGIN",
    "END",
    "FAIL",
    "REQUEUE",
    "ALL",
    "INVALID_DEPEND",
    "STAGE_OUT",
    "TIME_LIMIT",
    "TIME_LIMIT_90",
    "TIME_LIMIT_80",
    "TIME_LIMIT_50",
    "ARRAY_TASKS",
]
Plain = Annotated[str, Grammar(rf"{_PLAIN}+", "non-empty text without line breaks and control characters")]
Image = Annotated[
    str,
    Grammar(r"[A-Za-z0-9_/.~][A-Za-z0-9_/.~:#@+-]*", "the path or address of an image, such as /images/train.sqsh"),
]
Mount = Annotated[
    str,
    Grammar(
        r"[A-Za-z0-9_/.~][A-Za-z0-9_/.~+@-]*(?::[A-Za-z0-9_/.~][A-Za-z0-9_/.~+@-]*){0,2}",
        "/outside, /outside:/inside or /outside:/inside:ro",
    ),
]

SET_ELSEWHERE = {
    "account": "slurm.account",
    "array": "slurm.array",
    "chdir": "the folder in which launcher submit runs",
    "comment": "slurm.comment",
    "constraint": "slurm.constraint",
    "container": "slurm.container",
    "container-image": "slurm.container",
    "container-mounts": "slurm.container_mounts",
    "cpus-per-task": "slurm.cpus_per_task",
    "dependency": "slurm.dependency",
    "error": "output_dir",
    "exclude": "slurm.exclude",
    "exclusive": "slurm.exclusive",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus-per-task": "cluster.gpus_per_node",
    "gres": "slurm.gres",
    "job-name": "name",
    "mail-type": "slurm.mail_type",
    "mail-user": "slurm.mail_user",
    "mem": "slurm.mem",
    "no-requeue": "slurm.requeue",
    "nodelist": "slurm.nodelist",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes",
    "ntasks-per-node": "cluster.nodes",
    "open-mode": "your own template",
    "output": "output_dir",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "requeue": "slurm.requeue",
    "reservation": "slurm.reservation",
    "signal": "slurm.signal_seconds",
    "time": "slurm.time",
    "wrap": "your own template",
}
"""sbatch options that other parts of a job set: option → that part."""

_COMMAND_OPTIONS = ("help", "parsable", "quiet", "test-only", "usage", "verbose", "version", "wait")
"""Options with which sbatch does not submit a job and print its id at once."""

_OPTION = re.compile(rf"--([a-z][a-z0-9-]*)(?:=({_PLAIN}+))?")


def _extra_option(value: str) -> str:
    match = _OPTION.fullmatch(value)
    if match is None:
        raise PydanticCustomError("slurm_option", "must be --key or --key=value without control characters")
    # sbatch accepts abbreviated options: --part=x is --partition=x.
    option = next((option for option in SET_ELSEWHERE if option.startswith(match[1])), None)
    if option is not None:
        place = SET_ELSEWHERE[option]
        raise PydanticCustomError("slurm_set_elsewhere", "must not set what is set by {place}", {"place": place})
    if any(option.startswith(match[1]) for option in _COMMAND_OPTIONS):
        raise PydanticCustomError("slurm_command_option", "must be an option of the job, not of the sbatch command")
    return value


ExtraOption = Annotated[str, AfterValidator(_extra_option)]


def is_plain(text: str) -> bool:
    """Whether a text is safe in a script: no control characters, line ends or surrogates."""
    return re.fullmatch(f"{_PLAIN}*", text) is not None


def time_seconds(time: str) -> int | None:
    """A Slurm time in seconds; None if it is unlimited.

    Source: sbatch(1), --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
    """
    if not time[0].isdigit():
        return None
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, numbers[0], [*numbers, 0][1]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    return total or None


def gres_gpus(gres: str) -> int | None:
    """GPUs per node in a list of generic resources; None if it has no gpu entry."""
    entries = [entry.split(":") for entry in gres.split(",")]
    # A longer number is a type: Slurm counts to 2^32.
    counts = [int(entry[-1]) if re.fullmatch("[0-9]{1,9}", entry[-1]) else 1 for entry in entries if entry[0] == "gpu"]
    return sum(counts) if counts else None
