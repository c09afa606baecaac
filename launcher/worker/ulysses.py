"""Sequence parallelism (DeepSpeed's Ulysses): each rank has a part of every sequence and exchanges attention heads.

Ulysses: arXiv 2309.14509; for transformers: arXiv 2506.13996.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from launcher.plan.schema import Plan, World
from launcher.worker.ranks import Ranks


@dataclass(frozen=True)
class SequencePart:
    """This rank's part of every sequence: number `index` of `size` equal parts."""

    index: int = 0
    size: int = 1

    def cut(self, tensor: torch.Tensor, padding: int) -> torch.Tensor:
        """This rank's columns of a [sequences, length] tensor, after padding it to a multiple of `size`."""
        whole = functional.pad(tensor, (0, -tensor.shape[1] % self.size), value=padding)
        return whole.chunk(self.size, dim=1)[self.index].contiguous()


WHOLE = SequencePart()


def part_of(world: World, ranks: Ranks) -> SequencePart:
    """This rank's part: consecutive ranks share their sequences."""
    return SequencePart(ranks.rank % world.sequence_parallel_size, world.sequence_parallel_size)


def exchange_attention(plan: Plan, model: Any) -> Any:
    """Makes attention in this process gather whole sequences; returns the `mpu` argument of deepspeed.initialize.

    None without sequence parallelism.
    """
    size = plan.world.sequence_parallel_size
    if size == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    text = model.config.get_text_config()
    if getattr(text, "head_dim", 0) is None:
        # Some configs set None and let the model compute it; DeepSpeed would use the None.
        text.head_dim = text.hidden_size // text.num_attention_heads
    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=model.config._attn_implementation,
        sequence_parallel_size=size,
        micro_batch_size=plan.train_micro_batch_size_per_gpu,
        seq_length_is_variable=True,
    )


def gradient_divisor(plan: Plan) -> int:
    """The number by which DeepSpeed divides the sum of all ranks' gradients.

    Stages 0 to 2 divide by the data-parallel size, or by 1 if the JSON asks for sums; the reduce-scatter of stage 3
    divides by the world size (runtime/engine.py and runtime/comm/coalesced_collectives.py of 0.19.8).
    """
    if str(plan.ds_config.get("gradient_allreduce_op", "")).lower() == "sum":
        return 1
    return plan.world.size if plan.zero_stage == 3 else plan.world.data_parallel_size
