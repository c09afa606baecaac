"""The measuring process: `python -m launcher.prepare` reads a request and answers in JSON lines.

It runs apart from the command line, so that `launcher` itself imports neither torch nor transformers, and can start a
Ray meanwhile.
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
from launcher.prepare.request import ModelRequest, Request, carry_out, measured


def main() -> int:
    """0 when prepared, 2 for a bad request, 1 for a fault of ours. Answers go to the real standard output alone."""
    keep_private()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log

    def tell(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    asked = json.loads(sys.stdin.read())
    try:
        prepared = _prepared(asked, lambda **progress: tell(progress=progress))
    except RequestError as error:
        tell(problems=[vars(problem) for problem in error.problems])
        return 2
    except Exception as error:
        if isinstance(error, OSError) and needs_no_traceback(error):
            traceback.print_exc()
            tell(failed=os_error_text(error), code=code_of(error))
        else:
            tell(fault=traceback.format_exc())
        return 1
    tell(prepared=prepared.model_dump())
    return 0


def _prepared(asked: dict[str, Any], progress: Callable[..., None]) -> BaseModel:
    if "job" in asked:
        return carry_out(Request.model_validate(asked), progress)
    return measured(ModelRequest.model_validate(asked), progress)


if __name__ == "__main__":
    sys.exit(main())
