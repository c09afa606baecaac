"""The first failure of a rank, from its log."""

from __future__ import annotations

from datetime import UTC, datetime

from launcher.first_failure import raised_at, said
from launcher.tail import untimed


def test_a_rank_raised_when_it_said_so_and_not_when_it_ended() -> None:
    log = [
        "2026-01-02T03:04:05.500Z step 1",
        "2026-01-02T03:04:06.250Z [rank1]: Traceback (most recent call last):",
        "2026-01-02T03:04:06.251Z [rank1]: ValueError: no such file",
        "2026-01-02T03:04:09.000Z terminate called without an active exception",
    ]
    assert said(untimed(log), -6)[0] == "ValueError: no such file"
    raised = datetime(2026, 1, 2, 3, 4, 6, 250_000, UTC).timestamp()
    assert [raised_at(log, exit_code) for exit_code in (1, -6)] == [raised, raised]
    # What was raised and handled long ago did not end a rank that something killed, or that was told to end.
    assert [raised_at(log, exit_code) for exit_code in (-9, -15, 113)] == [None] * 3
    assert raised_at(log[:1], 1) is None and raised_at(untimed(log), 1) is None
