"""The first failure of a rank, from its log."""

from __future__ import annotations

from datetime import UTC, datetime

from launcher.files import strip_times
from launcher.first_failure import error_in_log, traceback_time


def test_the_time_of_an_exception_is_that_of_its_traceback_not_of_the_exit() -> None:
    log = [
        "2026-01-02T03:04:05.500Z step 1",
        "2026-01-02T03:04:06.250Z [rank1]: Traceback (most recent call last):",
        "2026-01-02T03:04:06.251Z [rank1]: ValueError: no such file",
        "2026-01-02T03:04:09.000Z terminate called without an active exception",
    ]
    assert error_in_log(strip_times(log), -6)[0] == "ValueError: no such file"
    raised = datetime(2026, 1, 2, 3, 4, 6, 250_000, UTC).timestamp()
    assert [traceback_time(log, exit_code) for exit_code in (1, -6)] == [raised, raised]
    # An exception that was handled long ago did not end a rank that was killed or ordered to end.
    assert [traceback_time(log, exit_code) for exit_code in (-9, -15, 113)] == [None] * 3
    assert traceback_time(log[:1], 1) is None and traceback_time(strip_times(log), 1) is None
