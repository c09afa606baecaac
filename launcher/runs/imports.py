"""Begins the imports of ranks on this machine while the run is planned and Ray starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    return job.cluster.warm_start and not isinstance(job, ScriptJob)


@contextmanager
def imports_begun(job: AnyJob, world: World, log: Path) -> Iterator[ForkServer | None]:
    """A fork server that imports meanwhile, if ranks may be started on this machine; it ends with the block.

    What the libraries print goes to `log`.
    """
    if not begins_imports(job) or SERVER_VARIABLE in os.environ or not _is_here(address_of(job.cluster.address)):
        yield None
        return
    environment = {**inherited_environment(), **rank_environment(world, None, os.environ, job.cluster.env)}
    own: OwnForkServer | None = None
    with suppress(OSError):
        own = OwnForkServer(environment, log)
    try:
        yield own.server if own else None
    finally:
        if own is not None:
            own.close()


def _is_here(address: str) -> bool:
    """Whether the Ray at an address has its head on this machine, or is to be started here."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]") or address
    return host in (*_LOOPBACK, socket.gethostname(), *own_addresses())
