"""The process of one rank: `python -m launcher.worker`, with torchrun's environment variables.

The heavy imports come first: they overlap with the start of the other ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from pathlib import Path

from launcher.errors import code_of
from launcher.files import keep_private
from launcher.fleet.ptrace import allow_agent
from launcher.plan.resume import Start
from launcher.records import DoneReport, FailedReport, ReadyReport
from launcher.worker.control import Control


def main() -> int:
    """Returns 0 if the rank finished or stopped on request; 1 if it failed: the traceback is logged and reported."""
    keep_private()
    allow_agent()
    control = Control.from_environment()
    try:
        from launcher.worker import train

        control.report(ReadyReport(report="ready", time=time.time()))
        go = control.wait_for_go()
        os.environ.update(go["env"])
        run_dir = Path(os.environ["LAUNCHER_RUN_DIR"])
        start = Start.model_validate(found) if (found := go.get("start")) else None
        train.run_rank(run_dir, Path(os.environ.get("LAUNCHER_PLAN", run_dir / "plan.json")), start, control)
    except BaseException as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        control.report(
            FailedReport(
                report="failed",
                time=time.time(),
                host=socket.gethostname(),
                code=code_of(error),
                error=type(error).__name__,
                message=str(error),
                traceback=text,
            )
        )
        return 1
    control.report(DoneReport(report="done", time=time.time()))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A failed rank must not wait for peers in a collective while the interpreter shuts down.
    os._exit(status)
