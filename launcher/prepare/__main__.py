"""The measuring process: `python -m launcher.prepare` reads a request and answers in JSON lines.

It runs apart from the command line, so that `launcher` itself imports neither torch nor transformers, and can start a
Ray meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from launcher.errors import RequestError
from launcher.prepare.request import Prepared, Request, carry_out


def main() -> int:
    """0 when prepared, 2 for a bad request, 1 for a fault of ours. Answers go to the real standard output alone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log

    def tell(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    request = Request.model_validate_json(sys.stdin.read())
    try:
        prepared: Prepared = carry_out(request, lambda **progress: tell(progress=progress))
    except RequestError as error:
        tell(problems=[vars(problem) for problem in error.problems])
        return 2
    except Exception:
        tell(fault=traceback.format_exc())
        return 1
    tell(prepared=prepared.model_dump())
    return 0


if __name__ == "__main__":
    sys.exit(main())
