"""Begins the imports of ranks on this machine while the run is planned and Ray starts."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from launcher.fleet.environment import inherited_environment, rank_environment
from launcher.fleet.forks import SERVER_VARIABLE, ForkServer, OwnForkServer
from launcher.fleet.network import own_addresses
from launcher.fleet.nodes import address_of
from launcher.job import AnyJob, ScriptJob
from launcher.plan.schema import World

_LOOPBACK = ("local", "localhost", "127.0.0.1", "::1")


def begins_imports(job: AnyJob) -> bool:
    """Whether the ranks of a job are forks of a process that has imported their libraries."""
    wanted = job.cluster.warm_start
    return not isinstance(job, ScriptJob) if wanted == "auto" else wanted


class ImportsAhead:
    """A fork server of this machine, begun at most once, that ends with a block of `with`."""

    def __init__(self, job: AnyJob, world: World, log: Path) -> None:
        """What the libraries print goes to `log`."""
        self._job, self._world, self._log = job, world, log
        self._own: OwnForkServer | None = None

    @property
    def server(self) -> ForkServer | None:
        """The server, which may still be importing, or None."""
        return self._own.server if self._own else None

    def begin(self) -> None:
        """Starts the server unless this is done, the job does not want it, or no rank can be on this machine."""
        job = self._job
        # The agents know the environment of a script, and begin its imports.
        wanted = begins_imports(job) and not isinstance(job, ScriptJob) and SERVER_VARIABLE not in os.environ
        if self._own is None and wanted and _is_here(address_of(job.cluster.address)):
            settings = rank_environment(self._world, None, os.environ, job.cluster.env)
            # Without it the agent starts its own.
            with suppress(OSError):
                self._own = OwnForkServer({**inherited_environment(), **settings}, self._log)

    def __enter__(self) -> ImportsAhead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()


def _is_here(address: str) -> bool:
    """Whether the Ray at an address has its head on this machine, or is to be started here."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]") or address
    return host in (*_LOOPBACK, socket.gethostname(), *own_addresses())
