"""Copies of a state in host memory, which keep their values while training changes the original."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.storage import TypedStorage, UntypedStorage

_PROTOCOL = 2
"""That of torch.save: some classes pickle differently under other protocols."""


class HostMemory:
    """Buffers in host memory for copies, pinned if the tensors of `device` are on a GPU.

    Buffers that are given back are used for the next copies: new memory is slow at its first use.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._free: dict[int, list[UntypedStorage]] = {}

    def copy(self, storage: UntypedStorage) -> UntypedStorage:
        """A copy of a storage; a copy from a GPU is finished after `finish`."""
        size = storage.nbytes()
        free = self._free.get(size)
        buffer = free.pop() if free else self._new(size)
        if size:
            buffer.copy_(storage, non_blocking=True)
        return buffer

    def finish(self) -> None:
        """Waits for the copies from the GPU."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def give_back(self, buffers: Iterable[UntypedStorage]) -> None:
        """Keeps these buffers for the next copies, and frees all others that are not in use."""
        free = defaultdict(list)
        for buffer in buffers:
            free[buffer.nbytes()].append(buffer)
        self._free = dict(free)

    def _new(self, size: int) -> UntypedStorage:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu and size > 0).untyped_storage()


@dataclass(frozen=True)
class HostCopy:
    """A copied state: its pickle, its strings, and the buffers with the values of its tensors."""

    pickled: bytes
    strings: tuple[str, ...]
    buffers: tuple[UntypedStorage, ...]

    def state(self) -> Any:
        """The state, with tensors on the CPU that share memory with each other as the original ones do."""
        return _Unpickler(self).load()


def host_copy(state: Any, memory: HostMemory) -> HostCopy:
    """Copies everything that torch.save would write of `state`."""
    data = io.BytesIO()
    pickler = _Pickler(data, memory)
    pickler.dump(state)
    memory.finish()
    return HostCopy(data.getvalue(), tuple(pickler.strings), tuple(pickler.buffers))


class _Pickler(pickle.Pickler):
    """Copies the memory of each tensor, and puts its number in its place.

    Strings stay the same objects: torch.save writes a string once, also if it is one of its own. So the file has the
    same bytes as without a copy.
    """

    def __init__(self, file: io.BytesIO, memory: HostMemory) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self._memory = memory
        self._numbers: dict[int, int] = {}
        self._originals: list[UntypedStorage] = []
        """Kept until the end: Python gives the address of a freed storage to a new one."""
        self.buffers: list[UntypedStorage] = []
        self.strings: list[str] = []

    def persistent_id(self, obj: Any) -> int | tuple[int, torch.dtype | None] | None:
        if type(obj) is str:
            self.strings.append(obj)
            return len(self.strings) - 1
        if isinstance(obj, TypedStorage):
            return self._number(obj._untyped_storage), obj.dtype
        return (self._number(obj), None) if isinstance(obj, UntypedStorage) else None

    def _number(self, storage: UntypedStorage) -> int:
        number = self._numbers.setdefault(storage._cdata, len(self.buffers))
        if number == len(self.buffers):
            self._originals.append(storage)
            self.buffers.append(self._memory.copy(storage))
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, copy: HostCopy) -> None:
        super().__init__(io.BytesIO(copy.pickled))
        self._buffers, self._strings = copy.buffers, copy.strings

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self._strings[pid]
        number, dtype = pid
        typed: Any = TypedStorage
        buffer = self._buffers[number]
        return buffer if dtype is None else typed(wrap_storage=buffer, dtype=dtype, _internal=True)
