"""Packs sequences into bins: rows of at most a number of tokens, best fit, longest first.

How many sequences of which lengths share a bin depends on the lengths alone, so every epoch has the same number of
bins. Which of the sequences of one length is where, and the order of the bins, are drawn for every epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Bins:
    """Sequences of given lengths (tokens) in bins of `capacity` tokens. Raises ValueError for a longer sequence."""

    def __init__(self, lengths: npt.ArrayLike, capacity: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if len(self._lengths) and int(self._lengths.max()) > capacity:
            raise ValueError(f"a sequence has {int(self._lengths.max())} tokens, more than a bin of {capacity}")
        bin_of = _best_fit(np.sort(self._lengths)[::-1], capacity)
        self._places = np.argsort(bin_of, kind="stable")
        self._offsets = np.concatenate(([0], np.cumsum(np.bincount(bin_of))))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def epoch(self, seed: int, epoch: int) -> list[Integers]:
        """The sequences of each bin, by index, in the epoch's order of bins."""
        # RandomState gives the same stream in every version of numpy; Generator may not.
        random = np.random.RandomState([seed, epoch])
        drawn = random.permutation(len(self._lengths))
        longest_first = drawn[np.argsort(-self._lengths[drawn], kind="stable")]
        bins = np.split(longest_first[self._places], self._offsets[1:-1])
        return [bins[place] for place in random.permutation(len(self))]


def _best_fit(lengths: Integers, capacity: int) -> Integers:
    """The bin of each sequence; `lengths` decrease. A sequence goes where the least room is left, else to a new bin."""
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_bins = _OpenBins(capacity)
    start = 0
    while start < len(lengths):
        length = int(lengths[start])
        stop = start + int(np.searchsorted(-lengths[start:], -length, side="right"))
        while start < stop:
            start += open_bins.fill(bin_of[start:stop], length)
    return bin_of


class _OpenBins:
    """The bins that have been opened, by the tokens of room in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._opened = capacity, 0
        self._rooms: list[int] = []
        self._bins: dict[int, list[Integers]] = {}

    def fill(self, bin_of: Integers, length: int) -> int:
        """Writes the bins of the next sequences of this length to the start of `bin_of`; returns how many they are.

        The bins are those with the least room that is enough. A bin takes as many of the sequences as fit: after each
        it is the one with the least room.
        """
        room, bins = self._with_least_room(length, len(bin_of))
        each = room // length
        placed = min(len(bin_of), each * len(bins))
        full, more = divmod(placed, each)
        bin_of[:placed] = np.repeat(bins[: full + 1], each)[:placed]
        self._add(room - each * length, bins[:full])
        if more:
            self._add(room - more * length, bins[full : full + 1])
        self._add(room, bins[full + bool(more) :])
        return placed

    def _with_least_room(self, length: int, wanted: int) -> tuple[int, Integers]:
        """The least room that is enough, and the bins with it, which are taken out; new ones if no room is enough."""
        at = bisect_left(self._rooms, length)
        if at < len(self._rooms):
            room = self._rooms.pop(at)
            return room, np.concatenate(self._bins.pop(room))
        first, number = self._opened, -(-wanted // (self._capacity // length))
        self._opened += number
        return self._capacity, np.arange(first, first + number, dtype=np.int64)

    def _add(self, room: int, bins: Integers) -> None:
        if not len(bins):
            return
        if room not in self._bins:
            insort(self._rooms, room)
        self._bins.setdefault(room, []).append(bins)
