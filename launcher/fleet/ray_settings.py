"""What the launcher sets of a Ray: its token, where it listens, what it prints, what its workers import."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from launcher.errors import RunFailed

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Has Ray take 127.0.0.1 for the address of this machine. All of its processes then listen there alone.

On Linux Ray replaces a loopback address that it is given by another one, and this is its one way around that.
"""


def write_token(file: Path) -> None:
    """A new secret, readable by its user alone."""
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))


def use_token(file: Path) -> None:
    """Has every Ray that this process and its children start or join ask for the secret in `file`."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    # Ray would take a secret that is in the environment itself over the file's.
    os.environ.pop("RAY_AUTH_TOKEN", None)


def quiet_ray() -> None:
    """What Ray would otherwise say, or send home, from this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray announces that it will one day leave CUDA_VISIBLE_DEVICES alone for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def job_config() -> Any:
    """Keeps this process's folder off the agents' path: a launcher.py in it would be imported there for the launcher.

    Ray has no option for that, and puts the folder in as it connects. Raises RunFailed if this Ray does so in another
    way, since the agents could then import something else in silence.
    """
    import ray
    from ray.job_config import JobConfig

    if not hasattr(JobConfig, "_get_proto_job_config") or not hasattr(JobConfig(), "_py_driver_sys_path"):
        found = f"Ray {ray.__version__} is not supported: it sets the import path of its workers in another way"
        raise RunFailed(f"{found}\n  install a version that docs/compatibility.md names")

    class Apart(JobConfig):  # type: ignore[misc]
        def _get_proto_job_config(self) -> Any:
            self._py_driver_sys_path: list[str] = []
            return super()._get_proto_job_config()

    return Apart()
