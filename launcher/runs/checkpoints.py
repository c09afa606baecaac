"""What a run has saved: its checkpoints, each with the plan that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.manifest import checkpoint_fault, checkpoint_number, read_manifest
from launcher.plan.schema import Plan, Script, hash_in
from launcher.plan_file import read_plan
from launcher.run_dir import DamagedCheckpoint, RunDir


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be loaded, and the plan in force when it was saved."""

    folder: Path
    update: int
    samples: int
    world_size: int
    plan: Plan
    plan_file: Path


def newest_saved(directory: RunDir) -> tuple[Saved, list[DamagedCheckpoint]]:
    """The newest checkpoint that can be loaded, and the newer ones that cannot. Raises RequestError if there is none.

    A run of the user's own script has none: it keeps its own.
    """
    refuse_script(directory)
    usable = directory.usable_checkpoints()
    if not usable:
        damaged = "".join(f"\n    {each}" for each in directory.damaged_checkpoints())
        found = f"there is no complete checkpoint to go on from{damaged}"
        raise RequestError(Problem(found, file=str(directory.checkpoints)))
    saved = _saved(directory, directory.checkpoint(usable[-1]))
    return saved, [each for each in directory.damaged_checkpoints() if _is_newer(each.path, saved)]


def saved_at(directory: RunDir, update: int) -> Saved:
    """The checkpoint of an update. Raises RequestError, with the updates that there are, if it cannot be loaded."""
    refuse_script(directory)
    folder = directory.checkpoint(update)
    if fault := checkpoint_fault(folder) if folder.is_dir() else "it does not exist":
        usable = ", ".join(map(str, directory.usable_checkpoints()))
        hint = f"checkpoints of these updates can be used: {usable}" if usable else "no checkpoint can be used"
        raise RequestError(Problem(str(DamagedCheckpoint(folder, fault)), file=str(directory.path), hint=hint))
    return _saved(directory, folder)


def refuse_script(directory: RunDir) -> None:
    """Raises RequestError if the run is that of a script of the user's own."""
    workload = read_plan(directory.plan_file).workload
    if isinstance(workload, Script):
        raise RequestError(
            Problem(
                f"this is a run of the script {' '.join(workload.arguments[:2])}, which keeps its own checkpoints",
                file=str(directory.path),
                hint="start it again with launcher exec, with the option by which the script goes on from them",
            )
        )


def _is_newer(damaged: Path, saved: Saved) -> bool:
    """By its samples if they can still be read; updates are counted differently under another batch size."""
    samples = (read_manifest(damaged) or {}).get("samples")
    return (checkpoint_number(damaged) or 0) > saved.update if samples is None else samples > saved.samples


def _saved(directory: RunDir, folder: Path) -> Saved:
    manifest = read_manifest(folder)
    assert manifest is not None
    update, samples, world_size = (manifest[key] for key in ("update", "samples", "world_size"))
    for file in (directory.plan_file, *directory.plan_revisions()):
        plan = read_plan(file)
        if manifest["plan_sha256"] in (plan.sha256, hash_in(file.read_text())):
            return Saved(folder, update, samples, world_size, plan, file)
    found = f"the plan {manifest['plan_sha256'][:12]}… that made {folder.name} is gone"
    raise RequestError(Problem(found, file=str(directory.path)))
