"""Host memory for the copies of a checkpoint that is written in the background. Pure."""

from __future__ import annotations

from launcher.ds_config.sizes import ZeroSizes
from launcher.plan.facts import ModelFacts
from launcher.plan.memory import PINNED, WIDTHS
from launcher.plan.schema import World


def copy_bytes(model: ModelFacts, sizes: ZeroSizes, precision: str, world: World) -> int:
    """The bytes on the first node, which has the most: its first rank also copies the weights, unless under ZeRO-3.

    Without ZeRO, only the first rank saves anything. Frozen parameters are not saved, but for a tied head.
    """
    width, trained = WIDTHS[precision], model.trainable_parameters
    states = (sizes.master_bytes + sizes.moments_bytes) * trained
    frozen = bool(model.adapted_modules) or trained < model.parameters
    weights = width * (trained + (model.vocab_size * model.hidden_size if model.tied_embeddings and frozen else 0))
    if sizes.stage == 0:
        # In float32 the weights are their own master copy.
        copied = weights + states - (sizes.master_bytes * trained if precision == "fp32" else 0)
    else:
        copied = (0 if sizes.stage == 3 else weights) + states * world.processes_per_node // world.size
    return int(copied * PINNED) if world.device == "cuda" else copied
