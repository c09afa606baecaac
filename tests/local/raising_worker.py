"""The real worker, of which rank 1 raises after the first update at which the file in LAUNCHER_RAISE_WHEN exists."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.worker import __main__ as worker
from launcher.worker import train


def raises_when(file: Path) -> None:
    """An exception in the middle of the run."""
    advance = train.TrainLoop.advance

    def with_fault(self, *arguments):
        if file.exists():
            raise RuntimeError("the disk of this node is on fire")
        advance(self, *arguments)

    train.TrainLoop.advance = with_fault


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        raises_when(Path(os.environ["LAUNCHER_RAISE_WHEN"]))
    status = worker.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
