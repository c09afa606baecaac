"""Has a Python whose PYTHONPATH has this folder read a clock that is as many seconds ahead as the file CLOCK_FILE has.

Only time.time: like the kernel's clock, those that measure durations do not jump.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_clock = time.time
_file = Path(os.environ["CLOCK_FILE"])


def _time() -> float:
    return _clock() + float(_file.read_text())


time.time = _time
