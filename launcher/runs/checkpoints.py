"""A run's checkpoints, each with the plan under which it was saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.manifest import checkpoint_fault, checkpoint_number, read_manifest
from launcher.plan.schema import Plan, Script, hash_in
from launcher.plan_file import read_plan
from launcher.run_dir import DamagedCheckpoint, RunDir


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that can be loaded, and the plan under which it was saved."""

    folder: Path
    update: int
    samples: int
    world_size: int
    plan: Plan
    plan_file: Path


def newest_checkpoint(directory: RunDir) -> tuple[SavedCheckpoint, list[DamagedCheckpoint]]:
    """The newest checkpoint that can be loaded, and newer ones that are damaged.

    Raises RequestError if no checkpoint can be loaded, and for a script's run: scripts manage their own checkpoints.
    """
    reject_script_run(directory)
    usable = directory.usable_checkpoints()
    if not usable:
        damaged = "".join(f"\n    {each}" for each in directory.damaged_checkpoints())
        found = f"no complete checkpoint found{damaged}"
        raise RequestError(Problem(found, file=str(directory.checkpoints)))
    saved = _saved(directory, directory.checkpoint(usable[-1]))
    return saved, [each for each in directory.damaged_checkpoints() if _is_newer(each.path, saved)]


def checkpoint_at(directory: RunDir, update: int) -> SavedCheckpoint:
    """The checkpoint of an update. Raises RequestError, which lists the usable updates, if it cannot be loaded."""
    reject_script_run(directory)
    folder = directory.checkpoint(update)
    if fault := checkpoint_fault(folder) if folder.is_dir() else "it does not exist":
        usable = ", ".join(map(str, directory.usable_checkpoints()))
        hint = f"usable checkpoints are those of updates: {usable}" if usable else "this run has no usable checkpoint"
        raise RequestError(Problem(str(DamagedCheckpoint(folder, fault)), file=str(directory.path), hint=hint))
    return _saved(directory, folder)


def reject_script_run(directory: RunDir) -> None:
    """Raises RequestError if the run is that of a user's script."""
    workload = read_plan(directory.plan_file).workload
    if isinstance(workload, Script):
        raise RequestError(
            Problem(
                f"this is a run of the script {' '.join(workload.arguments[:2])}, which manages its own checkpoints",
                file=str(directory.path),
                hint="start it again with launcher exec, with the script's own option for resuming",
            )
        )


def _is_newer(damaged: Path, saved: SavedCheckpoint) -> bool:
    """Compares samples if they can be read: after a change of batch size, update numbers are not comparable."""
    samples = (read_manifest(damaged) or {}).get("samples")
    return (checkpoint_number(damaged) or 0) > saved.update if samples is None else samples > saved.samples


def _saved(directory: RunDir, folder: Path) -> SavedCheckpoint:
    manifest = read_manifest(folder)
    assert manifest is not None
    update, samples, world_size = (manifest[key] for key in ("update", "samples", "world_size"))
    for file in (directory.plan_file, *directory.plan_revisions()):
        plan = read_plan(file)
        if manifest["plan_sha256"] in (plan.sha256, hash_in(file.read_text())):
            return SavedCheckpoint(folder, update, samples, world_size, plan, file)
    found = f"the plan {manifest['plan_sha256'][:12]}… of {folder.name} is missing"
    raise RequestError(Problem(found, file=str(directory.path)))
