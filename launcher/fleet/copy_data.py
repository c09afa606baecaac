"""Tokenises the data on a node that does not share the tokenised data of the others."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from launcher.errors import FailureCode, LauncherError, first_line
from launcher.plan.facts import SplitFacts
from launcher.plan.schema import Plan
from launcher.prepare import prepare

_SAME = ("rows", "sequences", "tokens", "targets", "bins")


def tokenise_on_node(plan: Plan, working_directory: str) -> str | None:
    """Tokenises the plan's data on this node and links it to the plan's paths. Returns None or an error message.

    Relative paths of the job start at `working_directory`, where the run was started.
    """
    try:
        with contextlib.chdir(working_directory):
            prepared = prepare(plan.training.job, lambda _progress: None)
        _link(prepared.model.folder, plan.training.model.folder)
        for name, planned, found in (
            ("data.train", plan.training.data.train, prepared.data.train),
            ("data.eval", plan.training.data.eval, prepared.data.eval),
        ):
            if planned and found:
                _check_same(name, planned, found)
                _link(found.folder, planned.folder)
    except (LauncherError, OSError) as error:
        return first_line(error)
    return None


def _check_same(name: str, planned: SplitFacts, found: SplitFacts) -> None:
    for key in _SAME:
        if getattr(planned, key) != getattr(found, key):
            message = f"{name} has {getattr(found, key)} {key} on this node, but {getattr(planned, key)} in the plan"
            raise LauncherError(message, code=FailureCode.DATA_DIFFERS)


def _link(source: str, target: str) -> None:
    """Links `target` to `source`: folder names depend on the files' times, which differ between nodes."""
    path = Path(target)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Atomic: it may replace a broken link, and another job may do the same at this moment.
    link = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    link.symlink_to(source)
    try:
        link.replace(path)
    except OSError:
        link.unlink()
        if not path.exists():
            raise
