"""One fork server (launcher/fleet/forks.py) for all ranks and measuring processes of the tests on a machine.

`fork_environment()` starts it once for this process, and returns the variables by which `launcher` commands, and the
agents of a Ray that is started with them, use it. `forking()` has code of this process use it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from launcher.fleet.environment import inherited_environment
from launcher.fleet.forks import ForkServer, OwnForkServer
from launcher.fleet.rank_starter import RankStarter
from launcher.worker.fork_server import MODULES
from tests.forked import fork_client

REPOSITORY = Path(__file__).parents[1]
_MODULES = ("datasets", "launcher.prepare.request", "launcher.worker.exporter", *MODULES)
"""What is imported before the first fork."""
_SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join((fork_client.FOLDER, str(REPOSITORY))),
}
"""What ranks of tests have in their environment: a rank with other values is not a fork of this server."""
_variables: dict[str, str] = {}


def fork_environment() -> dict[str, str]:
    """The variables by which processes use this process's fork server, which ends with this process."""
    if not _variables:
        folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
        server = _start(folder / "server.json")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(server.close)
        _variables.update(variables_for(folder / "server.json"))
    return dict(_variables)


def server_command(file: Path) -> list[str]:
    """Starts a server that `file` describes then, and waits; to be run in REPOSITORY."""
    return [sys.executable, "-m", __name__, str(file)]


def variables_for(file: Path) -> dict[str, str]:
    """The variables by which processes use the server that a file describes."""
    return {fork_client.SERVER_VARIABLE: str(file), "PYTHONPATH": _SETTINGS["PYTHONPATH"]}


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Within it the launcher's modules in this process start their Python processes as forks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, fork_environment()))
        for name in fork_client.PATCHED:
            module = importlib.import_module(name)
            stack.enter_context(mock.patch.object(module, "subprocess", fork_client.REPLACEMENT))
        yield


class SharedStarter(RankStarter):
    """Forks every rank from this process's fork server, whatever its environment."""

    def __init__(self) -> None:
        super().__init__(lambda _: None)
        self._server = ForkServer.read(Path(fork_environment()[fork_client.SERVER_VARIABLE]))


def _start(file: Path) -> OwnForkServer:
    server = OwnForkServer({**inherited_environment(), **_SETTINGS}, file.with_suffix(".log"), _MODULES)
    new = file.with_suffix(".new")
    server.server.write(new)
    new.rename(file)
    return server


if __name__ == "__main__":
    own = _start(Path(sys.argv[1]))
    own.wait()
