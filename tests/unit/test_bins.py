"""Sequences in bins: best fit, the same number of bins in every epoch, and an order by seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.bins import Bins

SIZES = st.integers(2, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=80))
)


def bins_one_by_one(lengths: list[int], capacity: int) -> int:
    """The number of bins if each sequence in turn, longest first, is put where the least room is left."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= length), default=None)
        if room is None:
            room = capacity
        else:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
def test_every_epoch_puts_each_sequence_into_one_of_the_best_fitting_bins(
    sizes: tuple[int, list[int]], seed: int
) -> None:
    capacity, lengths = sizes
    bins = Bins(lengths, capacity)
    assert len(bins) == bins_one_by_one(lengths, capacity)
    for epoch in range(3):
        packed = bins.epoch(seed, epoch)
        assert len(packed) == len(bins)
        assert sorted(np.concatenate(packed).tolist()) == list(range(len(lengths)))
        assert all(sum(lengths[sequence] for sequence in each) <= capacity for each in packed)


def test_bins_of_skewed_lengths_are_nearly_full() -> None:
    random = np.random.RandomState(0)
    lengths = np.clip(np.exp(random.normal(5, 1, 20_000)).astype(int), 2, 2048)
    assert lengths.sum() / (len(Bins(lengths, 2048)) * 2048) > 0.99


def test_an_epoch_depends_on_lengths_seed_and_epoch_alone() -> None:
    lengths = np.random.RandomState(1).randint(2, 30, 500)

    def packed(seed: int, epoch: int) -> list[list[int]]:
        return [each.tolist() for each in Bins(lengths, 64).epoch(seed, epoch)]

    used = Bins(lengths, 64)
    used.epoch(7, 0)
    assert [each.tolist() for each in used.epoch(7, 1)] == packed(7, 1)
    assert packed(7, 0) != packed(7, 1) != packed(8, 1)
    # Not only the order of the bins changes, but also which sequences share one.
    assert {frozenset(each) for each in packed(7, 0)} != {frozenset(each) for each in packed(7, 1)}


def test_a_sequence_that_is_longer_than_a_bin_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sequence has 65 tokens, more than a bin of 64"):
        Bins([3, 65], 64)
