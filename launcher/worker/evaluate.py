"""The loss on the evaluation data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launcher.chunked_loss import LossLayer
from launcher.token_store import TokenStore
from launcher.worker.batches import IGNORED, collate, collate_row
from launcher.worker.loss import summed_loss
from launcher.worker.ranks import Ranks
from launcher.worker.ulysses import WHOLE, SequencePart

Positions = npt.NDArray[np.int64]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the learned tokens (nats), its exponential, and the number of learned tokens."""

    loss: float
    perplexity: float
    targets: int


@torch.no_grad()
def evaluate(
    engine: Any,
    store: TokenStore,
    micro_batch: int,
    ranks: Ranks,
    part: SequencePart = WHOLE,
    layer: LossLayer | None = None,
    *,
    packing: bool = False,
) -> Evaluation:
    """The token-weighted mean loss over all ranks; each sequence counts once, for any number of ranks.

    All ranks run the same number of micro-batches, which ZeRO-3 requires; the last one may repeat a sequence without
    counting it. With `packing` the sequences of a micro-batch share a row instead of being padded.
    """
    engine.eval()
    stride = ranks.world_size // part.size * micro_batch
    total = 0.0
    for start in range(0, len(store), stride):
        positions = np.arange(micro_batch) + start + ranks.rank // part.size * micro_batch
        tensors, packed = _row(store, positions, ranks) if packing else (_padded(store, positions, ranks), ())
        total += float(summed_loss(engine, *tensors, part=part, layer=layer, packed=packed))
    engine.train()
    summed, targets = ranks.sum([total])[0], int(store.targets.sum())
    loss = summed / targets
    return Evaluation(loss, math.exp(loss) if loss < 700 else math.inf, targets)


def _padded(store: TokenStore, positions: Positions, ranks: Ranks) -> Tensors:
    """The tensors of the sequences at `positions`; beyond the end of the store, its last one without labels."""
    ids, mask, labels = collate(store, np.minimum(positions, len(store) - 1), ranks.device)
    labels[torch.from_numpy(positions >= len(store)).to(labels.device)] = IGNORED
    return ids, mask, labels


def _row(store: TokenStore, positions: Positions, ranks: Ranks) -> tuple[Tensors, tuple[int, ...]]:
    """(tensors, lengths) of the sequences at `positions` in one row; beyond the end, of one without labels."""
    within = positions[positions < len(store)]
    ids, mask, labels, lengths = collate_row(store, within if len(within) else np.array([0]), ranks.device)
    return (ids, mask, labels if len(within) else labels.fill_(IGNORED)), lengths
