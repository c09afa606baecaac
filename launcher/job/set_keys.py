"""Which keys of a job were set. plan.json stores them beside the values, so that a resume knows the user's choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from pydantic import BaseModel

from launcher.job.schema import AnyJob

AnySection = TypeVar("AnySection", bound=BaseModel)
JobT = TypeVar("JobT", bound=AnyJob)


def set_keys(job: AnyJob) -> list[str]:
    """Dotted names of every section and key that was set, including to 'auto' or null, in alphabetical order."""
    return sorted(_set_in(job, ""))


def changed_keys(job: AnyJob) -> list[str]:
    """Dotted names of every section and key whose value differs from its default, in alphabetical order."""
    return sorted(_changed_in(job, ""))


def with_set_keys(job: JobT, names: Iterable[str]) -> JobT:
    """The same job with exactly the keys `names` marked as set. Raises ValueError for a name that it does not have."""
    wanted = set(names)
    marked = _marked(job, wanted, "")
    if unknown := wanted - set(set_keys(marked)):
        raise ValueError(f"the job has no key {min(unknown)}")
    return marked


def _set_in(section: BaseModel, at: str) -> Iterator[str]:
    for name in section.model_fields_set:
        yield at + name
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _set_in(value, f"{at}{name}.")


def _changed_in(section: BaseModel, at: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.get_default(call_default_factory=True):
            yield at + name
            if isinstance(value, BaseModel):
                yield from _changed_in(value, f"{at}{name}.")


def _marked(section: AnySection, names: set[str], at: str) -> AnySection:
    fields = type(section).model_fields
    values = {name: getattr(section, name) for name in fields}
    for name, value in values.items():
        if isinstance(value, BaseModel):
            values[name] = _marked(value, names, f"{at}{name}.")
    return type(section).model_construct({name for name in fields if at + name in names}, **values)
