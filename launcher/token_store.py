"""Tokenised sequences on disk: flat arrays, written once and memory-mapped by every rank."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from launcher.files import publish_folder

__all__ = ["TokenStore", "TokenWriter", "publish_folder"]

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


class TokenWriter:
    """Writes sequences to a folder that gets its name, complete, when the `with` block ends without an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._offsets, self._targets = [0], []  # type: list[int], list[int]
        self.longest = 0

    def __enter__(self) -> TokenWriter:
        self._temporary.mkdir(parents=True)
        self._tokens = (self._temporary / _TOKENS).open("wb")
        self._learned = (self._temporary / _LEARNED).open("wb")
        return self

    def add(self, tokens: Sequence[int], learned: Sequence[int]) -> None:
        """Adds one sequence. `learned` has a 1 for each token whose prediction is learned, else 0."""
        mask = np.asarray(learned, dtype=np.uint8)
        self._tokens.write(np.asarray(tokens, dtype=np.int32).tobytes())
        self._learned.write(mask.tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._targets.append(int(mask[1:].sum()))
        self.longest = max(self.longest, len(tokens))

    def facts(self) -> dict[str, int]:
        """Counts of the added sequences and tokens, and the longest sequence."""
        return {
            "sequences": len(self._targets),
            "tokens": self._offsets[-1],
            "targets": sum(self._targets),
            "longest": self.longest,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._learned.close()
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        np.asarray(self._offsets, dtype=np.int64).tofile(self._temporary / _OFFSETS)
        np.asarray(self._targets, dtype=np.int32).tofile(self._temporary / _TARGETS)
        (self._temporary / "facts.json").write_text(json.dumps(self.facts()))
        publish_folder(self._temporary, self.folder)
