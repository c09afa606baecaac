"""Telling the failure that began it from those that only followed, when one rank takes all others with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

ENDED = ("signal SIGTERM", "exit code 113")
"""How ranks end that were told to, and those whose agent went away."""
_AT_ONCE_SECONDS = 2.0
"""Failures this close together may have been noticed in another order than they happened."""
LOST_PEER = re.compile(
    "|".join(
        (
            r"Connection (?:closed|reset) by (?:remote )?peer",
            r"Watchdog caught collective operation timeout",
            r"Timed out waiting \d+ms for (?:recv|send) operation",
            r"Application timeout caused pair closure",
            r"remote process exited or there was a network error",
            r"Some NCCL operations have failed or timed out",
            r"NCCL communicator (?:was|is) aborted",
            r"failed to recv, got 0 bytes",
            r"(?:gloo|c10d|TCPStore|ProcessGroup)[^\n]*(?:Broken pipe|Socket closed|Connection refused)",
        )
    )
)
"""What a rank says that waited for others in a collective when one of them went away."""


class Noticed(Protocol):
    """A failure as it was noticed: when (seconds since the epoch, None if unknown), how, and what was said."""

    @property
    def time(self) -> float | None: ...

    @property
    def how(self) -> str: ...

    @property
    def error(self) -> str | None: ...

    @property
    def traceback(self) -> str | None: ...


F = TypeVar("F", bound=Noticed)


def first_of(noticed: Sequence[F]) -> F:
    """The first in time; but not one that only lost a peer, where that peer's own failure was noticed right after."""
    begun = noticed[0]
    for one in noticed:
        near = one.time is None or begun.time is None or one.time - begun.time <= _AT_ONCE_SECONDS
        if near and not fell(one) and one.how not in ENDED:
            return one
    return begun


def fell(noticed: Noticed) -> bool:
    """Whether it fell in a collective because another one had gone."""
    return any(LOST_PEER.search(text) for text in (noticed.error, noticed.traceback) if text)
