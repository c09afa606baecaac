"""Checkpoints: one folder each, with DeepSpeed's own files and a manifest that is written last."""

from __future__ import annotations

import contextlib
import math
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import FailureCode, RunFailed, first_line
from launcher.job.kept_checkpoints import removable
from launcher.manifest import evaluation_loss, merged_records, replaced_folder
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.records import FileRecord, ManifestFacts
from launcher.run_dir import RunDir, checkpoint_is_complete, read_manifest, universal_folder, write_manifest
from launcher.worker.checkpoint_files import CheckpointFiles, written_through
from launcher.worker.control import RecordEvent
from launcher.worker.host_copy import HostMemory
from launcher.worker.ranks import Ranks


@dataclass(frozen=True)
class Progress:
    """The progress of a run: where a resume continues."""

    update: int
    samples: int


@dataclass(frozen=True)
class _Pending:
    """A checkpoint without a manifest: what the manifest will contain, and this rank's files once they are written."""

    folder: Path
    facts: ManifestFacts
    files: Future[dict[str, FileRecord]]


class Checkpoints:
    """Saves and prunes the checkpoints of one run.

    A checkpoint can be written in the background: a thread writes and hashes copies of the states while training
    continues. It stays pending until all ranks know that all have written their files, and then gets its manifest.
    Only the main thread calls collectives.
    """

    def __init__(self, run: RunDir, plan: Plan, ranks: Ranks, record_event: RecordEvent) -> None:
        self._run, self._plan, self._ranks, self._record_event = run, plan, ranks, record_event
        self._saved: int | None = None
        self._evaluation: tuple[int, float] | None = None
        self._early_stop: tuple[int, str] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory = HostMemory(ranks.device)
        self._pending: _Pending | None = None
        self._completing: Future[None] | None = None
        """The manifest and pruning on the first rank; on other ranks nothing to do."""

    def due(self, update: int) -> bool:
        """Whether a checkpoint is due after `update` updates."""
        section = self._plan.job.checkpoint
        return any(every is not None and update % every == 0 for every in (section.every, section.keep_every))

    def evaluated(self, update: int, loss: float) -> None:
        """Remembers the evaluation after `update` updates: a checkpoint of the same update has its loss."""
        self._evaluation = (update, loss)

    def ends_early(self, update: int, reason: str) -> None:
        """Remembers that the run ends after `update` updates: the checkpoint of this update has the reason."""
        self._early_stop = (update, reason)

    def save(
        self, engine: Any, progress: Progress, plan_sha256: str, guard: dict[str, Any], *, background: bool = False
    ) -> Path:
        """Saves a checkpoint unless this update has one already, then removes checkpoints beyond `keep`.

        `plan_sha256` is the hash of the current plan (or revision); `guard` is the state of the spike guard. Waits for
        a pending checkpoint first. With `background` it returns when the states are copied to host memory: the
        checkpoint is pending until `agree` or `wait` completes it.
        """
        self.wait()
        folder = self._run.checkpoint(progress.update)
        if self._saved == progress.update:
            return folder
        self._run.check_attempt()
        if self._ranks.first:
            _make_room(folder)
        self._ranks.barrier()
        facts = self._facts(progress, plan_sha256)
        client_state = {**asdict(progress), "plan_sha256": plan_sha256, "guard": guard, "universal_checkpoint_info": {}}
        files = CheckpointFiles(folder, self._memory if background else None)
        with written_through(files, engine):
            engine.save_checkpoint(
                self._run.checkpoints,
                tag=folder.name,
                client_state=client_state,
                save_latest=False,
                # Every start loads frozen weights from the pretrained folder. (DeepSpeed leaves out a tied weight under
                # one of its names only; the copy under the other name does no harm.)
                exclude_frozen_parameters=True,
            )
        files.save(torch.save, _random_states(self._ranks.device), folder / f"random-{self._ranks.rank}.pt")
        files.add(_swapped_files(folder, self._ranks.rank))
        self._pending = _Pending(folder, facts, self._thread.submit(files.finish))
        self._saved = progress.update
        if not background:
            self.wait()
        return folder

    @property
    def written(self) -> bool:
        """Whether this rank has written all files of a pending checkpoint. Raises the error of a failed write."""
        if self._completing is not None and self._completing.done():
            self._completing.result()
        if self._pending is None or not self._pending.files.done():
            return False
        self._pending.files.result()
        return True

    def agree(self, written: float) -> None:
        """Completes the pending checkpoint if all ranks have written their files.

        `written` is the number of ranks whose `written` is true: the same on every rank, so that all complete it at
        the same update.
        """
        if self._pending is not None and written == self._ranks.world_size:
            self._complete(self._pending)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. All ranks must call it. Raises the error of a failed write."""
        if self._pending is not None:
            self._complete(self._pending)
        if self._completing is not None:
            self._completing.result()
            self._completing = None
            self._ranks.barrier()

    def _complete(self, pending: _Pending) -> None:
        """Gathers what all ranks have written; the thread of the first rank then writes the manifest and prunes."""
        records = self._ranks.gather(pending.files.result())
        self._pending = None
        self._completing = self._thread.submit(self._write_manifest, pending, records)

    def _write_manifest(self, pending: _Pending, records: Sequence[Mapping[str, FileRecord]]) -> None:
        if not self._ranks.first:
            return
        facts = pending.facts
        self._run.check_attempt()
        write_manifest(pending.folder, merged_records(records), **facts)
        self._record_event({"event": "checkpoint", "update": facts["update"], "samples": facts["samples"]})
        # What cannot be removed now is removed after the next save.
        with contextlib.suppress(OSError):
            self._prune(pending.folder)

    def _facts(self, progress: Progress, plan_sha256: str) -> ManifestFacts:
        facts: ManifestFacts = {
            "world_size": self._ranks.world_size,
            "update": progress.update,
            "samples": progress.samples,
            "plan_sha256": plan_sha256,
        }
        if self._evaluation and self._evaluation[0] == progress.update and math.isfinite(self._evaluation[1]):
            facts["evaluation_loss"] = self._evaluation[1]
        if self._early_stop and self._early_stop[0] == progress.update:
            facts["early_stop"] = self._early_stop[1]
        return facts

    def load(self, engine: Any, start: Start) -> tuple[Progress, dict[str, Any]]:
        """Loads the checkpoint of `start` into a new engine. Returns the progress and the state of the spike guard.

        A checkpoint of another world size is loaded in converted form. Raises RunFailed if it cannot be used.
        """
        folder = Path(start.checkpoint)
        manifest = read_manifest(folder)
        if manifest is None:
            message = f"{folder} has no manifest: saving the checkpoint was not finished"
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
        # The plan may have a different batch size or scheduler than the one that saved the checkpoint.
        made = engine.global_steps - engine.skipped_steps
        engine.lr_scheduler.last_batch_iteration = made - 1 + self._plan.learning_rate.advance
        if manifest["world_size"] == self._ranks.world_size:
            _restore_random_states(folder / f"random-{self._ranks.rank}.pt", self._ranks.device)
            self._saved = state["update"] if start.update == state["update"] else None
        return Progress(update=start.update, samples=start.samples), state["guard"]

    def _prune(self, saved: Path) -> None:
        """Removes what the new checkpoint replaces, and what no rule of the job keeps; damaged ones do not count."""
        for unfinished in self._run.checkpoints.glob(".*.removed"):
            shutil.rmtree(unfinished, ignore_errors=True)
        _remove(replaced_folder(saved))
        usable = self._run.usable_checkpoints()
        losses = {update: evaluation_loss(self._run.saved_checkpoint(update)) for update in usable}
        for update in removable(losses, self._plan.job.checkpoint):
            _remove(self._run.saved_checkpoint(update))


def _swapped_files(folder: Path, rank: int) -> list[Path]:
    """This rank's optimizer states that are offloaded to NVMe: DeepSpeed copies them into the checkpoint."""
    return [path for path in (folder / "offloaded_tensors" / f"rank{rank:02d}").rglob("*") if path.is_file()]


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raises RunFailed with a hint if a checkpoint's files have the right sizes but cannot be read."""
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


def _make_room(folder: Path) -> None:
    """Frees the name of a new checkpoint. A complete one of this name stays usable until the new one is complete."""
    if not checkpoint_is_complete(folder):
        _remove(folder)
        return
    _remove(replaced_folder(folder))
    folder.rename(replaced_folder(folder))
    _remove(universal_folder(folder))


def _remove(folder: Path) -> None:
    """Removes a checkpoint and its converted form."""
    for path in (folder, universal_folder(folder)):
        removed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
        # Renamed first: a partly removed folder must not count as a checkpoint.
        with contextlib.suppress(FileNotFoundError):
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Loads a module saved without its frozen parameters. Raises RunFailed if anything else differs."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    frozen = {name for name, p in dst.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if differing := [*(name for name in missing if name not in frozen), *unexpected]:
        message = f"the checkpoint belongs to a different model: it differs in {', '.join(differing[:5])}"
        raise RunFailed(message, code=FailureCode.WEIGHTS_DIFFER)


def _group_settings(engine: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]


def _restore_settings(engine: Any, settings: list[dict[str, Any]]) -> None:
    """Restores the plan's weight decay, betas and gradient clipping, which loading a checkpoint overwrites.

    A converted checkpoint gives every parameter group the values of the first one (stage3.py of 0.19.8). The scheduler
    sets the learning rates afterwards. Raises RunFailed if this DeepSpeed keeps the clipping elsewhere.
    """
    for group, saved in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(saved)
    if engine.optimizer is engine.basic_optimizer:
        return
    if not hasattr(engine.optimizer, "clip_grad"):
        found = f"DeepSpeed's {type(engine.optimizer).__name__} has no clip_grad"
        raise RunFailed(f"{found}: gradient_clipping cannot be set to the plan's {engine.gradient_clipping()}")
    engine.optimizer.clip_grad = engine.gradient_clipping()


def _separate_steps(engine: Any) -> None:
    """Gives each parameter its own step counter.

    DeepSpeed's stage 3 loads one shared counter, which Adam then advances once per parameter (stage3.py of 0.19.8).
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
