"""The connection of this process to Ray: to one that runs already, or to one that is started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import psutil
from rich.markup import escape

from launcher.errors import FailureCode, RunFailed, first_line
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.process import children, kill_all, signals_blocked, with_children
from launcher.fleet.ray_folder import RayFolder
from launcher.fleet.ray_settings import (
    LOOPBACK_ONLY,
    OBJECT_STORE_BYTES,
    job_config,
    own_ray_variables,
    quiet_ray,
    restore_variables,
    use_token,
    write_token,
)


class RayConnection:
    """A connection to a Ray that was joined, or started here with the resources of one node."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self.folder: RayFolder | None = None
        """The folder of the Ray that was started here; None for a joined one."""
        self._variables: dict[str, str | None] = {}
        self._connected = False
        self._processes: set[psutil.Process] = set()

    @property
    def own(self) -> bool:
        """Whether the Ray was started here."""
        return self.folder is not None

    def connect(self, address: str, resources: NodeResources) -> None:
        """Joins the Ray at `address`, or starts one for "local", with a second try. Raises RunFailed.

        Does nothing if this is done already.
        """
        if self._connected:
            return
        quiet_ray()
        local = address == "local"
        options = self._local_options(resources) if local else {"address": address}
        options["job_config"] = job_config()
        for may_retry in (True, False) if local else (False,):
            before = children()
            try:
                _init_ray(options)
            except Exception as error:  # Ray's errors here have no common class
                # Ray ends its processes only when this process ends.
                kill_all(children() - before)
                if may_retry and not isinstance(error, TypeError | ValueError):
                    self._prepare_second_try(error)
                    continue
                where = "could not start Ray on this machine" if local else f"could not connect to the Ray at {address}"
                raise RunFailed(f"{where}: {first_line(error)}", code=FailureCode.RAY_LOST) from None
            self._connected, self._processes = True, children() - before
            return

    def end_own(self) -> None:
        """Ends a Ray that was started here, with its agents and ranks: `connect` starts another."""
        if self.folder is None:
            return
        import ray

        kill_all(with_children(self._processes))
        ray.shutdown()
        shutil.rmtree(self.folder.ray, ignore_errors=True)
        self._connected = False

    def close(self) -> None:
        """Leaves the Ray, and ends it if it was started here."""
        import ray

        if ray.is_initialized():
            ray.shutdown()
        if self.folder is not None:
            self.folder.remove()
            restore_variables(self._variables)

    def _prepare_second_try(self, error: Exception) -> None:
        """Prepares a second start of Ray, which on a busy machine may exceed its own time limits."""
        import ray

        self._log(f"          note: Ray did not start ({escape(first_line(error))}); starting it again")
        with contextlib.suppress(Exception):
            ray.shutdown()
        assert self.folder is not None
        shutil.rmtree(self.folder.ray, ignore_errors=True)

    def _local_options(self, resources: NodeResources) -> dict[str, Any]:
        """Options for a Ray only on this machine, with the resources of the run and its own token."""
        if self.folder is None:
            self.folder, self._variables = RayFolder(), own_ray_variables()
            write_token(self.folder.token)
        use_token(self.folder.token)
        os.environ.update(LOOPBACK_ONLY)
        return {
            "address": "local",
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self.folder.ray),
            # When memory is nearly full, as with ZeRO's offload, Ray would kill its only worker, the agent.
            "_system_config": {"memory_monitor_refresh_ms": 0},
        }


def _init_ray(options: dict[str, Any]) -> None:
    """Raises errors of many classes."""
    # Imported here because Ray reads its settings once, at import.
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    handler = signal.getsignal(signal.SIGTERM)
    # Slurm may send these to every process of the task; only the launcher handles them.
    try:
        with signals_blocked(signal.SIGUSR1, signal.SIGUSR2):
            ray.init(**quiet, **options)
    finally:
        # Ray installs a handler that exits at once; the run must save first.
        signal.signal(signal.SIGTERM, handler)
