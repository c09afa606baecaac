"""The environment variables of ranks: the user's, the plan's, and those of the node they run on."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.plan.schema import World
from launcher.secret_names import is_secret

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
"""What a script may need besides: where its packages are, and what it reports to."""


def forwarded_environment(environment: Mapping[str, str], *, script: bool = False) -> dict[str, str]:
    """Those of the user's variables that ranks on other nodes need as well; of `script`, secrets among them.

    They go to the agents alone, and are written to no file.
    """
    names = (*_FORWARDED, *_FOR_SCRIPTS) if script else _FORWARDED
    chosen = {key: value for key, value in environment.items() if key.startswith(names)}
    if script:
        return chosen
    # The launcher's own ranks work offline: a secret would travel for nothing.
    return {key: value for key, value in chosen.items() if not is_secret(key)}


def rank_environment(
    world: World, interface: str | None, own: Mapping[str, str], users: Mapping[str, str], *, script: bool = False
) -> dict[str, str]:
    """What every rank of a node is given besides torchrun's variables.

    `interface` is the one that reaches the other nodes, `own` the launcher's environment, `users` the job's
    cluster.env: later ones win. The ranks of a `script` are given more of the launcher's environment.
    """
    settings = {
        "OMP_NUM_THREADS": str(world.threads_per_process),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Everything is there by now; nothing a rank does may wait for the internet.
        "HF_HUB_OFFLINE": "1",
    }
    if world.device == "cpu":
        settings["DS_ACCELERATOR"] = "cpu"
    return {**settings, **_interfaces(world, interface), **forwarded_environment(own, script=script), **users}


def _interfaces(world: World, interface: str | None) -> dict[str, str]:
    """Over which interface gloo and NCCL talk. To NCCL a name is the beginning of one unless "=" stands before it."""
    if world.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": "lo"} if world.backend == "gloo" else {}
    if interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
