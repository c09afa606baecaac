"""Settings of Ray: its token, its addresses, its output, and the import path of its workers."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import RunFailed

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray use 127.0.0.1 as the address of this machine, so that all its processes listen only there.

On Linux Ray replaces a loopback address by another one; this variable is the only way to prevent it.
"""
NODE_LABEL = "launcher-node"
"""The label with a node's number in a Ray started by `launcher node`."""
OBJECT_STORE_BYTES = 100 * 1024**2


def write_token(file: Path) -> None:
    """Writes a new token, readable only by this user."""
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))


def use_token(file: Path) -> None:
    """Makes every Ray that this process and its children start or join use the token in `file`."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    # Ray would prefer a token in the environment to the file.
    os.environ.pop("RAY_AUTH_TOKEN", None)
    read_variables_again()


def read_variables_again() -> None:
    """Makes Ray in this process read the variables again: it keeps the mode of its import and the first token."""
    if "ray" in sys.modules:
        import ray

        # Without these names, a Ray does not start in a process that has imported ray or used another one.
        with contextlib.suppress(AttributeError):
            raylet: Any = ray._raylet
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()


def own_ray_variables() -> dict[str, str | None]:
    """The values of the variables that a Ray of our own changes in this process; None for those that are not set."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", *LOOPBACK_ONLY)
    return {name: os.environ.get(name) for name in names}


def restore_variables(values: Mapping[str, str | None]) -> None:
    """Restores the result of `own_ray_variables`, so that this process can use other Rays."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    read_variables_again()


def quiet_ray() -> None:
    """Switches off messages and usage statistics of Ray in this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Silences a warning that Ray will one day not change CUDA_VISIBLE_DEVICES for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def job_config() -> Any:
    """A job config that keeps this process's folder off the agents' import path.

    Otherwise the agents would import a launcher.py in that folder instead of the launcher. Ray has no option for this.
    Raises RunFailed if this Ray sets the path in another way, which could silently import the wrong module.
    """
    import ray
    from ray.job_config import JobConfig

    if not hasattr(JobConfig, "_get_proto_job_config") or not hasattr(JobConfig(), "_py_driver_sys_path"):
        found = f"Ray {ray.__version__} is not supported: it sets the import path of its workers in an unknown way"
        raise RunFailed(f"{found}\n  install a version listed in docs/compatibility.md")

    class WithoutDriverPath(JobConfig):  # type: ignore[misc]
        def _get_proto_job_config(self) -> Any:
            self._py_driver_sys_path: list[str] = []
            return super()._get_proto_job_config()

    return WithoutDriverPath()
