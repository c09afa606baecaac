"""`launcher export`: export any checkpoint of a run as a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from launcher.cli.options import OUTPUT_DIR, RUN
from launcher.errors import Problem, RequestError, nearest
from launcher.job.user_path import user_path

if TYPE_CHECKING:
    from launcher.export_folder import DType
    from launcher.run_dir import RunDir
    from launcher.runs.checkpoints import SavedCheckpoint


def export(
    run: str = RUN,
    update: int = typer.Option(None, "--update", metavar="N", help="The checkpoint after N updates; default: newest."),
    dtype: str = typer.Option(
        None, "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; default: the training dtype."
    ),
    merge: bool = typer.Option(False, "--merge", help="Merge LoRA adapters into the model, even if the job does not."),
    output: Path = typer.Option(None, "--output", metavar="DIR", help="The folder to write, which must be new."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Export any checkpoint of a run as a Hugging Face model, also while the run trains.

    This takes one process on this machine, without Ray or GPUs, and enough memory for the model. The weights are the
    same as those that the run itself would export at that update. With --dtype float32, a bfloat16 or float16 run under
    ZeRO exports the float32 master weights of its optimizer.

    The default folder is RUN/export-update-N, or RUN/export for a finished run without an export.
    """
    from launcher.run_dir import RunDir
    from launcher.runs.checkpoints import checkpoint_at, newest_verified, set_aside_if_idle
    from launcher.runs.export import export_saved
    from launcher.watch.find_run import find_run

    console = Console(highlight=False, soft_wrap=True)
    chosen = _dtype(dtype)
    directory = RunDir(find_run(run, output_dir).path)
    if not directory.plan_file.is_file():
        raise RequestError(Problem("it has no plan.json, so it is not a run directory", file=run))
    if update is None:
        saved, damaged = newest_verified(directory, console.print)
        for each in damaged:
            renamed = set_aside_if_idle(directory, each, saved)
            where = f" (renamed to {renamed.name})" if renamed else ""
            console.print(f"[yellow]note:[/] {escape(str(each))}; exporting {saved.folder.name} instead{where}")
    else:
        saved = checkpoint_at(directory, update, console.print)
    if merge and saved.plan.training.job.model.lora is None:
        raise RequestError(Problem("this run has no LoRA adapters to merge", key="--merge", file=str(directory.path)))
    folder = _new_folder(output) if output else _default_folder(directory, saved, chosen, merge)
    console.print(f"exporting {saved.folder.name} of {directory.path.name}")
    export_saved(saved, folder, lambda text: console.print(f"  {text}"), dtype=chosen, merge=merge)
    console.print(f"exported model  {folder}")


def _dtype(name: str | None) -> DType | None:
    from launcher.export_folder import DTYPES

    for dtype in DTYPES:
        if name == dtype:
            return dtype
    if name is None:
        return None
    close = nearest(name, DTYPES)
    hint = f"did you mean {close}?" if close else f"one of {', '.join(DTYPES)}"
    raise RequestError(Problem(f"cannot export as {name!r}", key="--dtype", hint=hint))


def _new_folder(output: Path) -> Path:
    """The absolute path of a folder that is empty or does not exist yet. Raises RequestError."""
    folder = user_path(output, "--output").resolve()
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        hint = "give a new folder, or remove this one"
        raise RequestError(Problem("this already exists", file=str(folder), key="--output", hint=hint))
    return folder


def _default_folder(directory: RunDir, saved: SavedCheckpoint, dtype: DType | None, merge: bool) -> Path:
    """RUN/export if the run's own export is missing and would be the same, else a folder named after the options."""
    from launcher.export_folder import export_fault

    last = saved.update == saved.plan.length.total_updates or saved.early_stop is not None
    own = last and saved.plan.job.export != "best" and dtype is None and not merge
    if own and export_fault(directory.export) is not None:
        return directory.export
    parts = ["export", saved.folder.name, *([dtype] if dtype else []), *(["merged"] if merge else [])]
    return directory.path / "-".join(parts)
