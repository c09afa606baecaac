"""The measuring process: `python -m launcher.prepare` reads a request and writes JSON lines.

As a separate process it keeps torch and transformers out of `launcher`, which can start Ray in the meantime.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from launcher.errors import RequestError, code_of, needs_no_traceback, os_error_text
from launcher.files import keep_private
from launcher.prepare.request import ModelRequest, Request, measured, run_request


def main() -> int:
    """The exit status: 0 for success, 2 for invalid input, 1 for other errors. Only messages go to standard output."""
    keep_private()
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of libraries goes to the log

    def send(**message: Any) -> None:
        messages.write(json.dumps(message) + "\n")

    request = json.loads(sys.stdin.read())
    try:
        prepared = _prepared(request, lambda **progress: send(progress=progress))
    except RequestError as error:
        send(problems=[vars(problem) for problem in error.problems])
        return 2
    except Exception as error:
        if isinstance(error, OSError) and needs_no_traceback(error):
            traceback.print_exc()
            send(failed=os_error_text(error), code=code_of(error))
        else:
            send(fault=traceback.format_exc())
        return 1
    send(prepared=prepared.model_dump())
    return 0


def _prepared(request: dict[str, Any], progress: Callable[..., None]) -> BaseModel:
    if "job" in request:
        return run_request(Request.model_validate(request), progress)
    return measured(ModelRequest.model_validate(request), progress)


if __name__ == "__main__":
    sys.exit(main())
