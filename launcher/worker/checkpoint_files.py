"""The files that one rank writes into a checkpoint: at once, or later from copies of their states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.storage import UntypedStorage

from launcher.errors import RunFailed
from launcher.manifest import file_records
from launcher.records import FileRecord
from launcher.worker.host_copy import HostCopy, HostMemory, host_copy

Save = Callable[[Any, str], object]
"""Writes a state to a path, as torch.save does."""


class CheckpointFiles:
    """The files of this rank in the checkpoint `folder`.

    With `memory`, states are copied there, and `finish` writes them.
    """

    def __init__(self, folder: Path, memory: HostMemory | None) -> None:
        self._folder, self._memory = folder, memory
        self._paths: list[Path] = []
        self._copies: list[tuple[Save, HostCopy, Path]] = []

    def save(self, save: Save, state: Any, path: Path) -> None:
        """Writes `state` to `path` with `save`, or copies it for `finish`."""
        if self._memory is None:
            save(state, str(path))
        else:
            self._copies.append((save, host_copy(state, self._memory), path))
        self._paths.append(path)

    def add(self, paths: Iterable[Path]) -> None:
        """Adds files that exist already."""
        self._paths += paths

    def finish(self) -> dict[str, FileRecord]:
        """Writes what was copied. Returns size and checksum of every file by its name; the files are on disk then."""
        for save, copy, path in self._copies:
            save(copy.state(), str(path))
        if self._memory is not None:
            self._memory.give_back(self._buffers())
        self._copies.clear()
        return file_records(self._folder, [path.relative_to(self._folder).as_posix() for path in self._paths])

    def _buffers(self) -> Iterator[UntypedStorage]:
        for _, copy, _ in self._copies:
            yield from copy.buffers


@contextlib.contextmanager
def written_through(files: CheckpointFiles, engine: Any) -> Iterator[None]:
    """Passes every file that DeepSpeed writes on this rank inside the block to `files`.

    Raises RunFailed if this DeepSpeed writes its files in another way.
    """
    writer: Any = getattr(engine, "checkpoint_engine", None)
    save = getattr(writer, "save", None)
    if save is None:
        raise RunFailed("this DeepSpeed has no checkpoint_engine.save, so the files of a checkpoint are unknown")
    writer.save = lambda state_dict, path: files.save(save, state_dict, Path(path))
    try:
        yield
    finally:
        del writer.save
