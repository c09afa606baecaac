"""What nodes of an allocation say to each other where one will not take part, before they have met.

Small files in a folder beside the run directory, which need not be there yet. Whoever waits for the others looks here,
and the last node to leave removes the folder.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from launcher.errors import FailureCode, RunFailed, code_of, known_code
from launcher.run_dir import RunDir, write_json
from launcher.slurm.allocation import Allocation

Check = Callable[[], None]


class RefusedElsewhere(RunFailed):
    """Another node of the allocation refused."""


class Refusals:
    """One node's view of them, for one start of the job: what an earlier one left behind is not taken for it."""

    def __init__(self, run: RunDir, allocation: Allocation) -> None:
        self._folder = run.path.with_name(f".{run.path.name}.refusals")
        self._allocation, self._met = allocation, False
        self._start = f"{allocation.start}-"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the others of whatever ends this node inside the block, until it has met them."""
        try:
            yield
        except BaseException as error:
            if not self._met:
                self._leave(_reason(error), code_of(error))
            raise

    def check(self) -> None:
        """Raises RefusedElsewhere, with the node and what it says, where another one refused."""
        found = [(node, said) for node, said in sorted(self._read().items()) if said["reason"]]
        if found:
            message = "\n".join(f"node {node} ({said['host']}) refused: {said['reason']}" for node, said in found)
            raise RefusedElsewhere(message, code=known_code(found[0][1].get("code")))

    def met(self) -> None:
        """From here on the nodes talk to each other."""
        self._met = True
        if self._allocation.node == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def follow(self) -> None:
        """Leaves without a reason of its own: the first node let go before it said what to do."""
        self._leave("")

    def _leave(self, reason: str, code: FailureCode = FailureCode.UNKNOWN) -> None:
        if self._allocation.nodes == 1:
            return
        # Where nothing can be written, the others wait as long as they would for a node that is gone.
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            own = self._folder / f"{self._start}{self._allocation.node}.json"
            write_json(own, {"host": socket.gethostname(), "reason": reason, "code": code})
            if len(self._read()) == self._allocation.nodes:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        """What each node that left has said; "" where it only followed another one."""
        found: dict[int, dict[str, Any]] = {}
        # One that is removed at this moment says nothing any more.
        with suppress(OSError, ValueError):
            for file in self._folder.glob(f"{self._start}*.json"):
                found[int(file.stem.removeprefix(self._start))] = json.loads(file.read_text())
        return found


def _reason(error: BaseException) -> str:
    if isinstance(error, RefusedElsewhere):
        return ""
    # The command line says an exit status by an exception of its own kind.
    if isinstance(error, KeyboardInterrupt | SystemExit) or hasattr(error, "exit_code"):
        return "it was asked to end"
    return str(error) or type(error).__name__
