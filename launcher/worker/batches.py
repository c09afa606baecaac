"""The samples of each update, and their tensors.

A sample is one sequence, or a bin of several if the sequences are packed. The order is a pure function of the lengths,
the seed and the epoch. Epochs follow each other without a gap: each update takes the next B samples of one endless
sequence, independent of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from launcher.bins import Bins
from launcher.errors import FailureCode, RunFailed
from launcher.plan.schema import Plan
from launcher.token_store import TokenStore

IGNORED = -100
_PAD_TO = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass on one rank.

    input_ids, attention_mask, labels: [sequences, length]; labels are IGNORED where nothing is learned. Packed
    sequences are in one row, [1, length]; `packed` are their lengths, in order.
    `update_targets` counts the learned tokens and `update_tokens` the tokens without padding of the whole update, over
    all ranks and micro-batches; `update_pairs` is the sum of its sequences' squared lengths.
    """

    update: int
    last_of_update: bool
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    update_targets: int
    update_tokens: int
    update_pairs: int = 0
    packed: tuple[int, ...] = ()

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, from which a GPU copies while the CPU continues."""
        return self._with_each(torch.Tensor.pin_memory)

    def on(self, device: torch.device) -> MicroBatch:
        """The same on `device`. The caller's stream copies pinned tensors when it reaches them."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        ids, mask, labels = (change(tensor) for tensor in (self.input_ids, self.attention_mask, self.labels))
        return replace(self, input_ids=ids, attention_mask=mask, labels=labels)


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


class BinOrder:
    """The endless sequence of bins: epoch after epoch, each packed and ordered by the seed and the epoch."""

    def __init__(self, lengths: npt.NDArray[np.int64], capacity: int, seed: int) -> None:
        self._bins, self._seed = Bins(lengths, capacity), seed
        self._epochs: dict[int, list[npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Bins per epoch."""
        return len(self._bins)

    def take(self, start: int, stop: int) -> list[npt.NDArray[np.int64]]:
        """The sequences, by index, of each of the bins at positions `start` to `stop` (exclusive)."""
        return [self._epoch(position // len(self))[position % len(self)] for position in range(start, stop)]

    def _epoch(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        if epoch not in self._epochs:
            self._epochs = {k: order for k, order in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = self._bins.epoch(self._seed, epoch)
        return self._epochs[epoch]


def order_of(plan: Plan, store: TokenStore) -> SampleOrder | BinOrder:
    """The order of the plan's samples. Raises RunFailed if the store fills another number of bins than planned."""
    data, seed = plan.training.job.data, plan.job.train.seed
    if not data.packing:
        return SampleOrder(len(store), seed)
    order = BinOrder(np.diff(store.offsets), data.max_length, seed)
    if len(order) != plan.training.data.train.bins:
        found = f"the training data fills {len(order)} bins, but {plan.training.data.train.bins} are planned"
        message = f"{found}: it was changed, or packed by another version of the launcher"
        raise RunFailed(message, code=FailureCode.DATA_DIFFERS)
    return order


def micro_batches(
    store: TokenStore,
    order: SampleOrder | BinOrder,
    share: Share,
    updates: range,
    first_sample: int,
    *,
    by_length: bool = False,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of `updates`, on the CPU. The first starts at position `first_sample` of the order.

    With `by_length`, sequences of similar length share a micro-batch; each update still has the same ones.
    """
    for update in updates:
        start = first_sample + (update - updates.start) * share.batch
        samples = order.take(start, start + share.batch)
        if by_length and isinstance(samples, np.ndarray):
            samples = samples[np.argsort(-store.lengths(samples), kind="stable")]
        sequences = samples if isinstance(samples, np.ndarray) else np.concatenate(samples)
        lengths = store.lengths(sequences)
        totals = int(store.targets[sequences].sum()), int(lengths.sum()), int((lengths**2).sum())
        for step in range(share.accumulation):
            last, mine = step == share.accumulation - 1, samples[share.samples(step)]
            if isinstance(mine, np.ndarray):
                yield MicroBatch(update, last, *collate(store, mine, _CPU), *totals)
            else:
                ids, mask, labels, packed = collate_row(store, np.concatenate(mine), _CPU)
                yield MicroBatch(update, last, ids, mask, labels, *totals, packed)


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


def collate_row(
    store: TokenStore, sequences: npt.NDArray[np.int64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(input_ids, attention_mask, labels, lengths) of `sequences` one after the other in a single row.

    The first token of a sequence is not a label: the token before it, of another sequence, must not predict it. The row
    is rounded up to a multiple of 8 tokens; what is added counts as a further sequence without labels.
    """
    lengths = [int(length) for length in store.lengths(sequences)]
    if rest := -sum(lengths) % _PAD_TO:
        lengths.append(rest)
    ids = np.zeros((1, sum(lengths)), dtype=np.int64)
    labels = np.full(ids.shape, IGNORED, dtype=np.int64)
    start = 0
    for sequence in sequences:
        tokens, learned = store[int(sequence)]
        stop = start + len(tokens)
        ids[0, start:stop] = tokens
        labels[0, start + 1 : stop] = np.where(learned[1:] == 1, tokens[1:], IGNORED)
        start = stop
    tensors = (torch.from_numpy(part).to(device, non_blocking=True) for part in (ids, np.ones_like(ids), labels))
    return *tensors, tuple(lengths)  # type: ignore[return-value]
