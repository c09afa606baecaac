"""How long nodes do not answer, and when one is lost. Pure: the caller gives the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

POLL_SECONDS = 2.0
"""Within this time a live agent answers each call for reports."""
NOTICE_SECONDS, LOST_SECONDS = 5.0, 20.0
"""A node that has not answered for so long is reported, and is lost."""


class AnswerTimes:
    """How long each node has not answered; reports it, and decides when the node is lost.

    Every agent is called all the time, and answers each call within POLL_SECONDS.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._waited: list[float] = []
        self._noticed: set[int] = set()
        self.lost: set[int] = set()
        self._checked: float | None = None

    def begin(self, nodes: int) -> None:
        """Begins with this many nodes, which have just answered."""
        self._waited, self._noticed, self.lost, self._checked = [0.0] * nodes, set(), set(), None

    def answered(self, node: int) -> None:
        """The node has answered, or is known to be lost."""
        if node < len(self._waited):
            self._waited[node] = 0.0

    def check(self, now: float, hosts: Sequence[str]) -> list[int]:
        """The nodes that are lost now. `now` is in seconds, on a clock that does not jump."""
        # A pause of this process, in which it could receive no answer, hardly counts.
        passed = 0.0 if self._checked is None else min(now - self._checked, POLL_SECONDS)
        self._checked, newly = now, []
        for node, waited in enumerate(self._waited):
            self._waited[node] = waited + passed
            name = f"node {node} ({hosts[node]})"
            if self._waited[node] < NOTICE_SECONDS and node in self._noticed:
                self._noticed.discard(node)
                self._log(f"          {name} answers again")
            elif self._waited[node] >= NOTICE_SECONDS and node not in self._noticed:
                self._noticed.add(node)
                self._log(f"          {name} has not answered for {NOTICE_SECONDS:.0f} s")
            if self._waited[node] >= LOST_SECONDS and node not in self.lost:
                self.lost.add(node)
                newly.append(node)
        return newly
