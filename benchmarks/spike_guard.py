"""How runs at too high a rate end under `schedule.on_spike`: warn, and extend_warmup.

A base model is trained on Python sources at a rate that suits it, and fine-tuned on Python's documentation at several
peaks with every remedy, each by the project's own worker (launcher.worker.train.Training) as one rank. The model is an
OPT of four layers of 48 on bytes that normalises after each block, as OPT-350m does: such models are known to collapse
suddenly at a high rate. A Llama of that size does not: with these texts it only learns less, up to thirty times its
best rate.

    python benchmarks/spike_guard.py [--quick] [--seeds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.plan.model import Plan
    from launcher.run_dir import RunDir
    from launcher.worker.ranks import Ranks

PEAKS = {0.005: "sound", 0.02: "edge", 0.04: "beyond"}
REMEDIES = ("warn", "extend_warmup")
BASE_UPDATES, BASE_LR = 400, 2e-3
UPDATES, WARMUP, BATCH, CHARACTERS = 240, 80, 16, 62
ONSET_RISE, ONSET_SPAN = 0.3, 16
"""Where a run breaks, seen afterwards: the mean of so many losses from there on lies so many nats above the lowest
mean of as many before."""


@dataclass(frozen=True)
class Outcome:
    """How one run ended. Losses in nats a byte; `final` is None where the run stopped itself."""

    peak: float
    seed: int
    remedy: str
    first: float
    final: float | None
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    spikes: tuple[int, ...]
    extended: tuple[int, ...]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the run stopped on a loss that is no number, or left the model worse than it found it."""
        return self.final is None or not self.final < self.first

    @property
    def onset(self) -> int | None:
        """The update at which the loss left its level for good or for long; None where it never did."""
        means = [fmean(self.losses[u : u + ONSET_SPAN]) for u in range(len(self.losses) - ONSET_SPAN + 1)]
        risen = (u for u in range(ONSET_SPAN, len(means)) if means[u] > min(means[: u - ONSET_SPAN + 1]) + ONSET_RISE)
        return next(risen, None)


def write_texts(folder: Path) -> None:
    """code.jsonl and docs.jsonl to learn from, and docs-eval.jsonl from the last tenth of the documentation."""
    from pydoc_data.topics import topics

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = "".join(file.read_text(errors="ignore") for file in sources)
    docs = "\n".join(topics.values())
    cut = len(docs) * 9 // 10
    for name, text, count in (("code", code, 8000), ("docs", docs[:cut], 6000), ("docs-eval", docs[cut:], 256)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in pieces(text, count)))


def pieces(text: str, count: int) -> Iterable[str]:
    """Pieces of the text's ASCII characters, from places drawn at random."""
    plain, draw = text.encode("ascii", "ignore").decode(), random.Random(0)
    starts = (draw.randrange(len(plain) - CHARACTERS) for _ in range(count))
    return (plain[start : start + CHARACTERS] for start in starts)


def make_model(folder: Path) -> None:
    """The untrained model, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        do_layer_norm_before=False,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    OPTForCausalLM(config).save_pretrained(folder)


def job_dict(folder: Path, model: str, text: str, train: dict[str, Any], schedule: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "guarded",
        "model": {"name_or_path": str(folder / model), "dtype": "float32"},
        "data": {
            "train": str(folder / f"{text}.jsonl"),
            "eval": str(folder / "docs-eval.jsonl"),
            "max_length": CHARACTERS + 2,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH, **train},
        "schedule": {"shape": "cosine", "allow_unsafe": True, **schedule},
        "deepspeed": "zero1",
        "cluster": {"processes_per_node": 1, "gpus_per_node": 0},
        "checkpoint": {"save_final": False},
        "export": model == "untrained",
        "output_dir": str(folder / "runs"),
    }


@cache
def only_rank(port: int) -> Ranks:
    """This process as the one rank of its runs."""
    from launcher.plan.model import Plan
    from launcher.worker.ranks import join_ranks

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)
    return join_ranks(Plan.model_construct(world=_World()))


@dataclass(frozen=True)
class _World:
    device: str = "cpu"
    backend: str = "gloo"
