"""How an agent starts ranks: as forks of a process that has their libraries imported already, or as fresh processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from launcher.errors import os_error_text
from launcher.fleet.forks import SERVER_VARIABLE, ForkServer, NotForkedError, OwnForkServer, ServerUnavailableError
from launcher.fleet.process import Child, start_process

IMPORTS_LOG = "imports.log"
"""What the libraries print while an agent's own fork server imports them; in the folder of the node's logs."""


class RankStarter:
    """Starts the ranks of a node. `log` gets one line for each decision."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._own: OwnForkServer | None = None
        self._server: ForkServer | None = None
        self._refused = False

    def prepare(self, environment: Mapping[str, str], log_folder: Path, offered: ForkServer | None) -> None:
        """Chooses the fork server for ranks with this environment, or starts one; returns while that still imports.

        `offered` is one that somebody else has started, possibly on another node.
        """
        self._server = None
        if self._refused:
            return
        if self._own is not None:
            if self._own.alive() and self._own.server.unlike(environment) is None:
                self._server = self._own.server
                return
            self.close()
        self._server = self._suitable(environment, offered)
        if self._server is None:
            try:
                self._own = OwnForkServer(environment, log_folder / IMPORTS_LOG)
            except OSError as error:
                self._log(f"the fork server could not be started: {os_error_text(error)}")
            else:
                self._server = self._own.server

    def start(self, command: Sequence[str], environment: Mapping[str, str], fds: Mapping[str, int]) -> Child:
        """A rank, as `start_process` starts it. Waits until the fork server has imported everything."""
        if self._server is not None:
            try:
                return self._server.fork(command, environment, fds)
            except NotForkedError as error:
                self._log(f"the ranks are fresh processes: {error}")
                # Another server would refuse for the same reason. The next attempt replaces one that has ended.
                self._refused = not isinstance(error, ServerUnavailableError)
                self._server = None
        return start_process(command, environment, fds)

    def close(self) -> None:
        """Ends the agent's own fork server."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _suitable(self, environment: Mapping[str, str], offered: ForkServer | None) -> ForkServer | None:
        for server in filter(None, (offered, *_named())):
            if server.ended():
                continue
            if difference := server.unlike(environment):
                self._log(f"fork server {server.pid} is not used: {difference}")
                continue
            return server
        return None


def _named() -> Iterator[ForkServer]:
    """The fork server that this process's environment names."""
    if file := os.environ.get(SERVER_VARIABLE):
        try:
            yield ForkServer.read(Path(file))
        except (OSError, ValueError, KeyError, TypeError):
            return
