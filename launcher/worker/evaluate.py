"""The loss on the evaluation data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from launcher.chunked_loss import LossLayer
from launcher.token_store import TokenStore
from launcher.worker.batches import IGNORED, collate
from launcher.worker.loss import summed_loss
from launcher.worker.ranks import Ranks
from launcher.worker.ulysses import WHOLE, SequencePart


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
) -> Evaluation:
    """The token-weighted mean loss over all ranks; each sequence counts once, for any number of ranks.

    All ranks run the same number of micro-batches, which ZeRO-3 requires; the last one may repeat a sequence without
    counting it.
    """
    engine.eval()
    stride = ranks.world_size // part.size * micro_batch
    total = 0.0
    for start in range(0, len(store), stride):
        positions = np.arange(micro_batch) + start + ranks.rank // part.size * micro_batch
        ids, mask, labels = collate(store, np.minimum(positions, len(store) - 1), ranks.device)
        labels[torch.from_numpy(positions >= len(store)).to(labels.device)] = IGNORED
        total += float(summed_loss(engine, ids, mask, labels, part=part, layer=layer))
    engine.train()
    summed, targets = ranks.sum([total])[0], int(store.targets.sum())
    loss = summed / targets
    return Evaluation(loss, math.exp(loss) if loss < 700 else math.inf, targets)
