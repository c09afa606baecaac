"""The environment variables of ranks: the user's, the plan's, and those of their node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.plan.schema import World
from launcher.run_dir import nccl_dump_prefix
from launcher.secret_names import is_secret

PORT_VARIABLE = "LAUNCHER_RENDEZVOUS_FD"
"""The descriptor of the listening socket at MASTER_PORT, in the first rank."""
_RECORDED = "2000"
"""How many collectives NCCL's flight recorder remembers."""
_FORWARDED = (
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "DS_",
    "NCCL_",
    "GLOO_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "LAUNCHER_",
)
_FOR_SCRIPTS = (
    *("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("WANDB_", "MLFLOW_", "COMET_", "NEPTUNE_", "CLEARML_", "AIM_", "TENSORBOARD_", "UCX_"),
)
"""Further variables that a script may need: paths of packages, and settings of experiment trackers."""


def inherited_environment() -> dict[str, str]:
    """The environment that ranks get from this process: without Ray's variables, this Python's programs on the PATH.

    DeepSpeed builds its kernels with the ninja that is installed beside it; without this it is not found if the
    launcher was called by its path.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    tools = str(Path(sys.executable).parent)
    path = inherited.get("PATH", os.defpath)
    return inherited if tools in path.split(os.pathsep) else {**inherited, "PATH": f"{tools}{os.pathsep}{path}"}


def forwarded_environment(environment: Mapping[str, str], *, script: bool = False) -> dict[str, str]:
    """The user's variables that ranks on other nodes need as well; for a `script` including secrets.

    They are sent only to the agents, and never written to a file.
    """
    names = (*_FORWARDED, *_FOR_SCRIPTS) if script else _FORWARDED
    chosen = {key: value for key, value in environment.items() if key.startswith(names)}
    if script:
        return chosen
    # The launcher's own ranks work offline and need no secrets.
    return {key: value for key, value in chosen.items() if not is_secret(key)}


def flight_recorder(world: World, log_folder: Path, environment: Mapping[str, str], attempt: int = 1) -> dict[str, str]:
    """Variables with which NCCL writes its last collectives to `log_folder`/nccl-rank-<r> when one times out.

    Those that `environment`, a rank's other variables, sets under the same or the other name are left out.
    """
    if world.backend != "nccl":
        return {}
    # Each has one name in this PyTorch and another in older ones. PyTorch prefers the new name.
    values = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): _RECORDED,
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(log_folder / nccl_dump_prefix(attempt)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
    }
    return {name: value for names, value in values.items() if environment.keys().isdisjoint(names) for name in names}


def rank_environment(
    world: World,
    interface: str | None,
    launcher_env: Mapping[str, str],
    job_env: Mapping[str, str],
    *,
    script: bool = False,
) -> dict[str, str]:
    """The variables of every rank of a node besides torchrun's.

    `interface` reaches the other nodes; `launcher_env` is the launcher's environment, `job_env` the job's cluster.env.
    Later sources win. The ranks of a `script` get more of the launcher's environment.
    """
    settings = {
        "OMP_NUM_THREADS": str(world.threads_per_process),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Everything has been fetched already; a rank must not wait for the internet.
        "HF_HUB_OFFLINE": "1",
    }
    if world.device == "cpu":
        settings["DS_ACCELERATOR"] = "cpu"
    return {
        **settings,
        **_interfaces(world, interface),
        **forwarded_environment(launcher_env, script=script),
        **job_env,
    }


def _interfaces(world: World, interface: str | None) -> dict[str, str]:
    """The interface for gloo and NCCL. NCCL takes a name as a prefix unless it starts with "="."""
    if world.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": "lo"} if world.backend == "gloo" else {}
    if interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
