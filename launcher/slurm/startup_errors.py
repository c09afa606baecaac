"""How a node reports an error to the other nodes of an allocation before they are connected.

Small files in a folder beside the run directory, which may not exist yet. Nodes that wait for others read them; the
last node to end removes the folder.
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


class OtherNodeFailed(RunFailed):
    """Another node of the allocation failed to start."""


class StartupErrors:
    """The startup errors of all nodes, seen from one node, for one start of the job."""

    def __init__(self, run: RunDir, allocation: Allocation) -> None:
        self._folder = run.path.with_name(f".{run.path.name}.startup-errors")
        self._allocation, self._connected = allocation, False
        self._start = f"{allocation.start}-"

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Reports to the other nodes an error that ends this node inside the block, before `connected` is called."""
        try:
            yield
        except BaseException as error:
            if not self._connected:
                self._write(_reason(error), code_of(error))
            raise

    def check(self) -> None:
        """Raises OtherNodeFailed, with the node and its reason, if another node failed to start."""
        found = [(node, error) for node, error in sorted(self._read().items()) if error["reason"]]
        if found:
            message = "\n".join(
                f"node {node} ({error['host']}) failed to start: {error['reason']}" for node, error in found
            )
            raise OtherNodeFailed(message, code=known_code(found[0][1].get("code")))

    def connected(self) -> None:
        """Call this once the nodes are connected: errors are then reported over the connection."""
        self._connected = True
        if self._allocation.node == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def leave(self) -> None:
        """Call this if the first node ended before it sent an order: this node ends without its own reason."""
        self._write("")

    def _write(self, reason: str, code: FailureCode = FailureCode.UNKNOWN) -> None:
        if self._allocation.nodes == 1:
            return
        # If nothing can be written, the other nodes wait for this one until their timeout.
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            own = self._folder / f"{self._start}{self._allocation.node}.json"
            write_json(own, {"host": socket.gethostname(), "reason": reason, "code": code})
            if len(self._read()) == self._allocation.nodes:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        """What each node wrote; its reason is "" if it ended because of another node."""
        found: dict[int, dict[str, Any]] = {}
        # A file may be removed while it is read.
        with suppress(OSError, ValueError):
            for file in self._folder.glob(f"{self._start}*.json"):
                found[int(file.stem.removeprefix(self._start))] = json.loads(file.read_text())
        return found


def _reason(error: BaseException) -> str:
    if isinstance(error, OtherNodeFailed):
        return ""
    # typer reports an exit status with its own exception, which has an exit_code.
    if isinstance(error, KeyboardInterrupt | SystemExit) or hasattr(error, "exit_code"):
        return "it was interrupted"
    return str(error) or type(error).__name__
