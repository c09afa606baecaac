"""The samples of each update, and their tensors.

The order is a pure function of the seed and the epoch. Epochs follow each other without a gap: each update takes the
next B samples of one endless sequence, independent of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from launcher.token_store import TokenStore

IGNORED = -100
_PAD_TO = 8


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass on one rank.

    input_ids, attention_mask, labels: [sequences, length]; labels are IGNORED where nothing is learned.
    `update_targets` counts the learned tokens and `update_tokens` the tokens without padding of the whole update, over
    all ranks and micro-batches.
    """

    update: int
    last_of_update: bool
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    update_targets: int
    update_tokens: int


@dataclass(frozen=True)
class Share:
    """A rank's part of every update."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int

    @property
    def batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation

    def samples(self, micro_step: int) -> slice:
        """Positions, within the update, of this rank's micro-batch `micro_step`."""
        start = (micro_step * self.world_size + self.rank) * self.micro_batch
        return slice(start, start + self.micro_batch)


class SampleOrder:
    """The endless sequence of samples: epoch after epoch, each in its own order."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Indices of the samples at positions `start` to `stop` (exclusive) of the sequence."""
        positions = np.arange(start, stop)
        epochs, places = np.divmod(positions, self.count)
        return np.array([self._epoch(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {k: order for k, order in self._epochs.items() if k == epoch - 1}
            # RandomState gives the same stream in every version of numpy; Generator may not.
            self._epochs[epoch] = np.random.RandomState([self.seed, epoch]).permutation(self.count)
        return self._epochs[epoch]


def micro_batches(
    store: TokenStore, order: SampleOrder, share: Share, updates: range, first_sample: int, device: torch.device
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of `updates`. The first update starts at position `first_sample` of the order."""
    for update in updates:
        start = first_sample + (update - updates.start) * share.batch
        samples = order.take(start, start + share.batch)
        targets, tokens = int(store.targets[samples].sum()), int(store.lengths(samples).sum())
        for step in range(share.accumulation):
            tensors = collate(store, samples[share.samples(step)], device)
            yield MicroBatch(update, step == share.accumulation - 1, *tensors, targets, tokens)


def collate(
    store: TokenStore, samples: npt.NDArray[np.int64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, labels) of `samples`, right-padded to the longest, rounded up to a multiple of 8."""
    longest = int(store.lengths(samples).max())
    shape = (len(samples), -(-longest // _PAD_TO) * _PAD_TO)
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        tokens, learned = store[int(sample)]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = np.where(learned == 1, tokens, IGNORED)
    return tuple(torch.from_numpy(part).to(device, non_blocking=True) for part in (ids, mask, labels))  # type: ignore[return-value]
