"""Checkpoints: DeepSpeed's own files in a folder an update, and a manifest that is written last."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import RunFailed
from launcher.plan.model import Plan
from launcher.run_dir import RunDir, read_manifest, write_manifest
from launcher.worker.ranks import Ranks


@dataclass(frozen=True)
class Progress:
    """How far a run is: what a resume needs to go on."""

    update: int
    samples: int


class Checkpoints:
    """Saves and prunes the checkpoints of one run."""

    def __init__(self, run: RunDir, plan: Plan, ranks: Ranks) -> None:
        self._run, self._plan, self._ranks = run, plan, ranks
        self._saved: int | None = None

    def due(self, update: int) -> bool:
        """Is it time for one after `update` updates?"""
        every = self._plan.job.checkpoint.every
        return every is not None and update % every == 0

    def save(self, engine: Any, progress: Progress) -> Path:
        """Writes a checkpoint unless this update's is there already; then removes those beyond `keep`."""
        folder = self._run.checkpoint(progress.update)
        if self._saved == progress.update:
            return folder
        state = {**asdict(progress), "plan_sha256": self._plan.sha256}
        engine.save_checkpoint(self._run.checkpoints, tag=folder.name, client_state=state, save_latest=False)
        torch.save(_random_states(self._ranks.device), folder / f"random-{self._ranks.rank}.pt")
        self._ranks.barrier()
        if self._ranks.first:
            write_manifest(folder, world_size=self._ranks.world_size, **state)
            self._run.event("checkpoint", update=progress.update)
            self._prune()
        self._ranks.barrier()
        self._saved = progress.update
        return folder

    def load(self, engine: Any, folder: Path) -> Progress:
        """Brings a fresh engine to where the checkpoint was saved. Raises RunFailed where it cannot be used."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise RunFailed(f"{folder} has no manifest: the checkpoint was never finished")
        if manifest["world_size"] != self._ranks.world_size:
            raise RunFailed(
                f"{folder} was saved by {manifest['world_size']} ranks and there are {self._ranks.world_size}"
            )
        path, state = engine.load_checkpoint(folder.parent, tag=folder.name)
        if path is None:
            raise RunFailed(f"DeepSpeed found nothing to load in {folder}")
        _restore_random_states(folder / f"random-{self._ranks.rank}.pt", self._ranks.device)
        self._saved = state["update"]
        return Progress(update=state["update"], samples=state["samples"])

    def _prune(self) -> None:
        for update in self._run.complete_checkpoints()[: -self._plan.job.checkpoint.keep]:
            folder = self._run.checkpoint(update)
            # Without its manifest a half-removed folder is no checkpoint.
            (folder / "manifest.json").unlink()
            shutil.rmtree(folder)


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
