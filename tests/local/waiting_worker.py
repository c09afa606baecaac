"""A worker whose ranks wait, in the first attempt, at the moment that the variable LAUNCHER_WAIT_AT names.

Each touches a file `waits-<rank>` in the run directory there, and waits until it is killed,
`continue` exists or the run directory is removed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.worker import __main__ as worker
from launcher.worker import train

_UPDATE = 5
"""The moments are after so many updates, of which the last checkpoint has four."""
_MOST_BYTES = 2**30
"""More than the tests allow, and less than a machine has."""


def _wait() -> None:
    folder = Path(os.environ["LAUNCHER_RUN_DIR"])
    (folder / f"waits-{os.environ['RANK']}").touch()
    while folder.exists() and not (folder / "continue").exists():
        time.sleep(0.02)


def _complete_checkpoint(owner: object = None) -> None:
    """Completes a checkpoint that is written in the background: ranks that wait would leave it pending."""
    if isinstance(owner, train.TrainLoop):
        owner.checkpoints.wait()
    elif isinstance(owner, train.Checkpoints):
        owner.wait()


def _waiting(function: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """The function, before which the rank waits."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            _complete_checkpoint(*arguments[:1])
            _wait()
        return function(*arguments, **named)

    return wrapped


def _filling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which rank 1 fills the memory after so many updates."""

    def wrapped(self: train.TrainLoop, *arguments: Any) -> Any:
        if self.progress.update == _UPDATE and os.environ["RANK"] == "1":
            filled = []
            while sum(map(len, filled)) < _MOST_BYTES:
                filled.append(b"x" * 2**24)
            raise RuntimeError(f"{_MOST_BYTES} bytes fit")
        return function(self, *arguments)

    return wrapped


def wait_at(moment: str) -> None:
    """Makes this rank wait at a moment."""
    loop = train.TrainLoop
    if moment == "starting":
        train.load_model = _waiting(train.load_model)
    elif moment == "training":
        loop.reduce = _waiting(loop.reduce, lambda self, *_: self.progress.update == _UPDATE)  # type: ignore[method-assign]
    elif moment == "full memory":
        loop.reduce = _waiting(_filling(loop.reduce), lambda self, *_: self.progress.update == _UPDATE)  # type: ignore[method-assign]
    elif moment == "evaluating":
        loop.evaluate = _waiting(loop.evaluate, lambda self: self.progress.update > 0)  # type: ignore[method-assign]
    elif moment == "saving":
        made = train.Checkpoints.save
        train.Checkpoints.save = _waiting(made, lambda _, __, progress, *___: progress.update > _UPDATE)  # type: ignore[method-assign]
    elif moment == "exporting":
        train.export_model = _waiting(train.export_model)


if __name__ == "__main__":
    if os.environ.get("LAUNCHER_ATTEMPT") == "1":
        wait_at(os.environ["LAUNCHER_WAIT_AT"])
    status = worker.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
