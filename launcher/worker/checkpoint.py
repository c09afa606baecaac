"""Checkpoints: DeepSpeed's own files in a folder an update, and a manifest that is written last."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import FailureCode, RunFailed, first_line
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import MANIFEST, RunDir, read_manifest, universal_folder, write_manifest
from launcher.worker.control import Tell
from launcher.worker.ranks import Ranks


@dataclass(frozen=True)
class Progress:
    """How far a run is: what a resume needs to go on."""

    update: int
    samples: int


class Checkpoints:
    """Saves and prunes the checkpoints of one run."""

    def __init__(self, run: RunDir, plan: Plan, ranks: Ranks, tell: Tell) -> None:
        self._run, self._plan, self._ranks, self._tell = run, plan, ranks, tell
        self._saved: int | None = None

    def due(self, update: int) -> bool:
        """Is it time for one after `update` updates?"""
        every = self._plan.job.checkpoint.every
        return every is not None and update % every == 0

    def save(self, engine: Any, progress: Progress, plan_sha256: str, guard: dict[str, Any]) -> Path:
        """Writes a checkpoint unless this update's is there already; then removes those beyond `keep`.

        `plan_sha256` names the plan, or its revision, that is in force; `guard` is what the spike guard remembers.
        """
        folder = self._run.checkpoint(progress.update)
        if self._saved == progress.update:
            return folder
        if self._ranks.first:
            _remove(folder)
        self._ranks.barrier()
        state = {**asdict(progress), "plan_sha256": plan_sha256}
        client_state = {**state, "guard": guard, "universal_checkpoint_info": {}}
        engine.save_checkpoint(
            self._run.checkpoints,
            tag=folder.name,
            client_state=client_state,
            save_latest=False,
            # Frozen weights are those of the pretrained folder, from which every start loads them. (DeepSpeed leaves
            # out a tied weight under one of its names only; the other is written, and does no harm.)
            exclude_frozen_parameters=True,
        )
        torch.save(_random_states(self._ranks.device), folder / f"random-{self._ranks.rank}.pt")
        self._ranks.barrier()
        if self._ranks.first:
            write_manifest(folder, world_size=self._ranks.world_size, **state)
            self._tell("checkpoint", update=progress.update, samples=progress.samples)
            self._prune()
        self._ranks.barrier()
        self._saved = progress.update
        return folder

    def load(self, engine: Any, start: Start) -> tuple[Progress, dict[str, Any]]:
        """Brings a fresh engine to the start of what is left; returns that, and what the guard remembered.

        A converted checkpoint is one of another world size. Raises RunFailed where it cannot be used.
        """
        folder = Path(start.checkpoint)
        manifest = read_manifest(folder)
        if manifest is None:
            message = f"{folder} has no manifest: the checkpoint was never finished"
            raise RunFailed(message, code=FailureCode.CHECKPOINT_DAMAGED)
        tag = universal_folder(folder).name if start.convert else folder.name
        settings = _group_settings(engine)
        with _readable(folder):
            path, state = engine.load_checkpoint(folder.parent, tag=tag, custom_load_fn=_load_trained)
        if path is None:
            message = f"DeepSpeed found nothing to load in {folder.parent / tag}"
            raise RunFailed(message, code=FailureCode.CHECKPOINT_DAMAGED)
        _restore_settings(engine, settings)
        if start.convert:
            _separate_steps(engine)
        if start.update != state["update"]:
            engine.global_steps, engine.skipped_steps = start.update, 0
        # The plan may have another batch or scheduler than the one that saved this.
        made = engine.global_steps - engine.skipped_steps
        engine.lr_scheduler.last_batch_iteration = made - 1 + self._plan.learning_rate.advance
        if manifest["world_size"] == self._ranks.world_size:
            _restore_random_states(folder / f"random-{self._ranks.rank}.pt", self._ranks.device)
            self._saved = state["update"] if start.update == state["update"] else None
        return Progress(update=start.update, samples=start.samples), state["guard"]

    def _prune(self) -> None:
        for update in self._run.complete_checkpoints()[: -self._plan.job.checkpoint.keep]:
            _remove(self._run.checkpoint(update))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Says what to do about a checkpoint whose files have the right sizes and cannot be read. Raises RunFailed."""
    try:
        yield
    except (KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunFailed(
            f"the checkpoint {folder} is damaged and cannot be read ({reason})\n"
            f"  Hint: mv {folder} {folder}.damaged; launcher resume then uses the checkpoint before it",
            code=FailureCode.CHECKPOINT_DAMAGED,
        ) from error


def _remove(folder: Path) -> None:
    """Removes a checkpoint and its converted form. Without its manifest a half-removed folder is no checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder, universal_folder(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Loads a saved module, in which frozen parameters are not. Raises RunFailed where anything else differs."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    frozen = {name for name, p in dst.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if differing := [*(name for name in missing if name not in frozen), *unexpected]:
        message = f"the checkpoint is of another model: it differs in {', '.join(differing[:5])}"
        raise RunFailed(message, code=FailureCode.WEIGHTS_DIFFER)


def _group_settings(engine: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]


def _restore_settings(engine: Any, settings: list[dict[str, Any]]) -> None:
    """Gives the optimizer what the plan says of it again: a checkpoint loads the weight decay, betas and clipping with
    which it was saved, and a converted one gives every parameter group the first one's (stage3.py of 0.19.8).

    The learning rates are the scheduler's, which is set after this. Raises RunFailed where the clipping is not where
    DeepSpeed keeps it.
    """
    for group, its in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(its)
    if engine.optimizer is engine.basic_optimizer:
        return
    if not hasattr(engine.optimizer, "clip_grad"):
        found = f"DeepSpeed's {type(engine.optimizer).__name__} has no clip_grad"
        raise RunFailed(f"{found}: gradient_clipping cannot be set to the plan's {engine.gradient_clipping()}")
    engine.optimizer.clip_grad = engine.gradient_clipping()


def _separate_steps(engine: Any) -> None:
    """Gives each parameter a step counter of its own.

    DeepSpeed's stage 3 loads one counter for all of them, which Adam then advances once for each (stage3.py of 0.19.8).
    """
    for state in engine.basic_optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(file: Path, device: torch.device) -> None:
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
