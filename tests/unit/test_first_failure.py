"""The first failure of a rank, from its log."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from launcher.files import strip_times
from launcher.first_failure import error_in_log, lost_peer, traceback_time
from launcher.fleet.failures import Failure


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


@pytest.mark.parametrize("reason", ["hanging or bugs in the application. \nCheck the logs", "crashing. "])
def test_what_gloo_writes_about_a_remote_worker_is_a_lost_peer(reason: str) -> None:
    error = f"RuntimeError: [pair.cc:553] Read error. This is typically caused by a remote worker {reason}"
    assert lost_peer(Failure(0, 0, 1.0, "exit code 1", error))
