"""The launcher in a container on a node: options of srun or apptainer that mount the folders of the job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job.schema import SlurmSection
from launcher.job.user_path import user_path


def container_command(slurm: SlurmSection, cwd: Path, folders: Iterable[Path]) -> tuple[list[str], list[str]]:
    """The options of srun for the container, and the command of the launcher on a node.

    The launcher starts in `cwd`, as without a container; `cwd` and `folders` are mounted at their own paths. Raises
    RequestError if one of them cannot be mounted.
    """
    if slurm.container is None:
        return [], ["launcher"]
    image, users = _home(slurm.container), [_home(mount) for mount in slurm.container_mounts]
    mounts = ",".join([*(f"{folder}:{folder}" for folder in _own_mounts([cwd, *folders], users)), *users])
    if slurm.container_runtime == "apptainer":
        binding = ["--bind", mounts] if mounts else []
        return [], ["apptainer", "exec", "--nv", "--pwd", str(cwd), *binding, image, "launcher"]
    mounted = [f"--container-mounts={mounts}"] if mounts else []
    return [f"--container-image={image}", f"--container-workdir={cwd}", *mounted], ["launcher"]


def _own_mounts(folders: Iterable[Path], users: Iterable[str]) -> list[Path]:
    """The folders that are neither mounted by the user nor inside another one of them."""
    # /outside:/inside:ro, or /both
    inside = [Path([*mount.split(":"), mount][1]) for mount in users]
    found: list[Path] = []
    for folder in sorted({Path(os.path.normpath(folder)) for folder in folders}):
        if not any(folder.is_relative_to(other) for other in (*inside, *found)):
            _check(folder)
            found.append(folder)
    return found


def _check(folder: Path) -> None:
    if folder == Path("/"):
        found = "the root of the file system cannot be mounted: it would replace the container's"
    elif set(",:") & set(str(folder)):
        found = f"{folder} contains a comma or a colon, which separate mounts"
    else:
        return
    hint = "submit from another folder, move the job file or output_dir, or mount the folder in slurm.container_mounts"
    raise RequestError(Problem(found, key="slurm.container_mounts", hint=hint))


def _home(path: str) -> str:
    return str(user_path(path)) if path.startswith("~") else path
