"""Failure codes for run directories from before failures had codes.

The patterns match sentences of those old files only, never messages that the launcher writes today.
"""

from __future__ import annotations

import re
import signal

from launcher.errors import FailureCode

_EXIT = re.compile(r"exit code (\d+)|signal (SIG[A-Z]+)|signal (\d+)")
_SENTENCES = (
    (FailureCode.VERSIONS_DIFFER, r"the plan was made with DeepSpeed|where the run was planned: install the same"),
    (FailureCode.PLAN_DIFFERS, r"the plan differs between ranks"),
    (FailureCode.PLAN_DAMAGED, r"plan\.json (?:is damaged, or of another version|was altered)"),
    (FailureCode.OUT_OF_STEP, r"OutOfStep: "),
    (FailureCode.NAN_LOSS, r"(?:loss|gradient norm) of update \d+ is (?:nan|-?inf)|whose gradient is no number"),
    (FailureCode.LOSS_SPIKE, r"a spike, as schedule\.on_spike asks"),
    (FailureCode.NODE_LOST, r"the node's agent is gone"),
    (FailureCode.NOT_ENOUGH_NODES, r"there are not enough free nodes"),
    (FailureCode.NOT_SHARED, r"node \d+ \(.*\) does not see "),
)


def exit_code_of(how: str) -> int | None:
    """The exit status in `how`, negative for a signal; None if it names none."""
    match = _EXIT.fullmatch(how)
    if match is None:
        return None
    code, name, number = match.groups()
    if code is not None:
        return int(code)
    if number is not None:
        return -int(number)
    return -int(signal.Signals[name]) if name in signal.Signals.__members__ else None


def code_of(*texts: str | None) -> FailureCode:
    """The code of the first known sentence; FailureCode.UNKNOWN if none is known."""
    for text in texts:
        for code, pattern in _SENTENCES:
            if text and re.search(pattern, text):
                return code
    return FailureCode.UNKNOWN
