"""Tokenised sequences on disk: flat arrays, written once and memory-mapped by every rank."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from launcher.files import publish_folder

__all__ = ["Sequences", "StoreFiles", "TokenStore", "TokenWriter", "publish_folder"]

Tokens = npt.NDArray[np.int32]
Learned = npt.NDArray[np.uint8]

_TOKENS, _LEARNED, _OFFSETS, _TARGETS = "tokens.i32", "learned.u8", "offsets.i64", "targets.i32"


class TokenStore:
    """Sequences of token ids, and which of them are learned; read-only.

    A sequence's targets are its learned tokens, except its first token, which no token predicts.
    """

    def __init__(self, folder: Path) -> None:
        self.offsets = np.fromfile(folder / _OFFSETS, dtype=np.int64)
        self.targets = np.fromfile(folder / _TARGETS, dtype=np.int32)
        total = int(self.offsets[-1])
        self._tokens: Tokens = np.memmap(folder / _TOKENS, dtype=np.int32, mode="r", shape=(total,))
        self._learned: Learned = np.memmap(folder / _LEARNED, dtype=np.uint8, mode="r", shape=(total,))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tokens, Learned]:
        """(token ids, 1 where a token is learned), each of shape [length]."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self._tokens[start:stop], self._learned[start:stop]

    def lengths(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The lengths in tokens of the sequences `indices`."""
        at = np.asarray(indices)
        lengths: npt.NDArray[np.int64] = self.offsets[at + 1] - self.offsets[at]
        return lengths


@dataclass(frozen=True)
class Sequences:
    """Sequences one after another, as they are stored: int32 token ids, and a byte per token with 1 if it is learned.

    `lengths` and `targets` are the tokens and the targets of each sequence.
    """

    tokens: bytes
    learned: bytes
    lengths: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]


class StoreFiles:
    """The files of a store in `folder` while they are written. Sequences are only appended: memory does not grow.

    Continues the files of an earlier process behind its first `sequences` sequences. Raises OSError if they are missing
    or shorter.
    """

    def __init__(self, folder: Path, sequences: int = 0) -> None:
        self.folder, self.sequences = folder, sequences
        self.tokens = self.targets = self.longest = 0
        if sequences:
            self._count(sequences)
        else:
            np.zeros(1, dtype=np.int64).tofile(folder / _OFFSETS)
        sizes = ((_TOKENS, 4 * self.tokens), (_LEARNED, self.tokens), (_OFFSETS, 8 * sequences + 8))
        with contextlib.ExitStack() as opened:
            self._files = {
                name: opened.enter_context((folder / name).open("r+b" if sequences or name == _OFFSETS else "w+b"))
                for name in (_TOKENS, _LEARNED, _OFFSETS, _TARGETS)
            }
            for name, size in (*sizes, (_TARGETS, 4 * sequences)):
                if self._files[name].seek(0, 2) < size:
                    raise OSError(f"{folder / name} has fewer than {size} bytes")
                self._files[name].truncate(size)
                self._files[name].seek(size)
            self._opened = opened.pop_all()

    def _count(self, sequences: int) -> None:
        """Counts the tokens and targets of the first `sequences` sequences in the files."""
        offsets = np.fromfile(self.folder / _OFFSETS, dtype=np.int64, count=sequences + 1)
        targets = np.fromfile(self.folder / _TARGETS, dtype=np.int32, count=sequences)
        if len(offsets) != sequences + 1 or len(targets) != sequences:
            raise OSError(f"{self.folder} has fewer than {sequences} sequences")
        self.tokens, self.targets = int(offsets[-1]), int(targets.sum(dtype=np.int64))
        self.longest = int(np.diff(offsets).max())

    def append(self, added: Sequences) -> None:
        """Adds sequences."""
        if not len(added.lengths):
            return
        offsets = self.tokens + np.cumsum(added.lengths)
        for name, content in (
            (_TOKENS, added.tokens),
            (_LEARNED, added.learned),
            (_OFFSETS, offsets.astype(np.int64).tobytes()),
            (_TARGETS, added.targets.tobytes()),
        ):
            self._files[name].write(content)
        self.sequences += len(added.lengths)
        self.tokens = int(offsets[-1])
        self.targets += int(added.targets.sum(dtype=np.int64))
        self.longest = max(self.longest, int(added.lengths.max()))

    def facts(self) -> dict[str, int]:
        """Counts of the sequences and tokens, and the longest sequence."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "targets": self.targets,
            "longest": self.longest,
        }

    def sync(self) -> None:
        """Waits until everything that was added is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def complete(self) -> None:
        """Closes the files and writes the counts beside them."""
        self.close()
        (self.folder / "facts.json").write_text(json.dumps(self.facts()))


class TokenWriter:
    """Writes sequences to a folder that gets its name, complete, when the `with` block ends without an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")

    def __enter__(self) -> TokenWriter:
        self._temporary.mkdir(parents=True)
        self._files = StoreFiles(self._temporary)
        return self

    def add(self, tokens: Sequence[int], learned: Sequence[int]) -> None:
        """Adds one sequence. `learned` has a 1 for each token whose prediction is learned, else 0."""
        mask = np.asarray(learned, dtype=np.uint8)
        self._files.append(
            Sequences(
                np.asarray(tokens, dtype=np.int32).tobytes(),
                mask.tobytes(),
                np.asarray([len(mask)], dtype=np.int64),
                np.asarray([mask[1:].sum()], dtype=np.int32),
            )
        )

    def facts(self) -> dict[str, int]:
        """Counts of the added sequences and tokens, and the longest sequence."""
        return self._files.facts()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.close()
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        self._files.complete()
        publish_folder(self._temporary, self.folder)
