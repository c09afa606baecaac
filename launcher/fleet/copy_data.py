"""Tokenised data on a node that does not see what was tokenised for the others."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from launcher.errors import FailureCode, LauncherError, first_line
from launcher.plan.facts import SplitFacts
from launcher.plan.schema import Plan
from launcher.prepare import prepare

_SAME = ("rows", "sequences", "tokens", "targets")


def provide(plan: Plan, working_directory: str) -> str | None:
    """Tokenises the plan's data once more, on this node, and puts it where the plan has it. None, or what went wrong.

    Paths of the job are read as in the folder that the run was started from.
    """
    try:
        with contextlib.chdir(working_directory):
            prepared = prepare(plan.training.job, lambda _progress: None)
        _put(prepared.model.folder, plan.training.model.folder)
        for name, there, here in (
            ("data.train", plan.training.data.train, prepared.data.train),
            ("data.eval", plan.training.data.eval, prepared.data.eval),
        ):
            if there and here:
                _check_same(name, there, here)
                _put(here.folder, there.folder)
    except (LauncherError, OSError) as error:
        return first_line(error)
    return None


def _check_same(name: str, there: SplitFacts, here: SplitFacts) -> None:
    for key in _SAME:
        planned, found = getattr(there, key), getattr(here, key)
        if planned != found:
            message = f"{name} has {found} {key} on this node and {planned} where the run was planned"
            raise LauncherError(message, code=FailureCode.DATA_DIFFERS)


def _put(here: str, wanted: str) -> None:
    """Makes what lies at `here` be found at `wanted` too: names hold the files' times, which differ between nodes."""
    path = Path(wanted)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: over a link that leads nowhere any more, and beside another job that does the same.
    link = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    link.symlink_to(here)
    try:
        link.replace(path)
    except OSError:
        link.unlink()
        if not path.exists():
            raise
