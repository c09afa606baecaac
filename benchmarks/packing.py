"""Time and memory of forward and backward for the same sequences, padded and packed (data.packing).

The sequences are docstrings of Python's standard library, one token per byte, cut at --length: real text whose lengths
differ much. One process per measurement makes a Llama with random weights (float32 on CPUs, bfloat16 on GPUs) and
computes loss and gradients of all sequences once with the launcher's own worker code, in micro-batches of as many
sequences as bins. The kinds run in turn. The time is CPU time on one thread, so that other processes do not count (on a
GPU: wall time). The peak is that of the process's anonymous memory (on a GPU: of allocated memory), with weights and
gradients and without optimizer states.

    python benchmarks/packing.py [--rounds 3] [--micro-batch 4] [--length 1024] [--sequences 60] [--device cuda]
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import ENVIRONMENT, MIB, sampled
from paired import measured, ratio_text

KINDS = ("padded", "packed")
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SPEED_TARGET, MEMORY_TARGET = 1.5, 1.0
"""At least this many times the useful tokens per second, at most this part of the memory of padding."""


def docstrings() -> Iterator[str]:
    """The docstrings of the standard library's modules, classes and functions."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def write_store(folder: Path, sequences: int, length: int) -> None:
    """A token store of as many docstrings, chosen at random."""
    import numpy as np

    from launcher.token_store import TokenWriter

    texts = list(docstrings())
    with TokenWriter(folder) as writer:
        for chosen in np.random.RandomState(0).permutation(len(texts))[:sequences]:
            tokens = [*(byte + 1 for byte in texts[chosen].encode()[: length - 1]), 0]
            writer.add(tokens, [1] * len(tokens))


def measure(kind: str, folder: Path, micro_batch: int, length: int, device: str) -> None:
    """Prints the useful tokens per second, the peak in bytes and the useful part of the computed tokens, as JSON."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from launcher import document_attention
    from launcher.bins import Bins
    from launcher.token_store import TokenStore
    from launcher.worker.batches import collate, collate_row
    from launcher.worker.loss import summed_loss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    document_attention.register()
    name = document_attention.NAME if kind == "packed" else "sdpa"
    model: Any = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation=name)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    store, target = TokenStore(folder), torch.device(device)
    if kind == "packed":
        bins = Bins(np.diff(store.offsets), length).epoch(0, 0)
        batches = [np.concatenate(bins[start : start + micro_batch]) for start in range(0, len(bins), micro_batch)]
    else:
        order = np.random.RandomState(0).permutation(len(store))
        batches = np.split(order, range(micro_batch, len(store), micro_batch))

    def step(sequences: Any) -> int:
        """Computes loss and gradients of a micro-batch; returns its tokens with padding."""
        if kind == "packed":
            *tensors, packed = collate_row(store, sequences, target)
        else:
            tensors, packed = list(collate(store, sequences, target)), ()
        summed_loss(model, *tensors, packed=packed).backward()
        return int(tensors[0].numel())

    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    step(batches[0])
    model.zero_grad()
    with sampled() as peak:
        start = clock()
        computed = sum(step(sequences) for sequences in batches)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = clock() - start
        largest = torch.cuda.max_memory_allocated() if on_gpu else peak()
    tokens = int(store.offsets[-1])
    print(json.dumps({"speed": tokens / seconds, "peak": largest, "useful": tokens / computed}))


def compare(rounds: int, folder: Path, rest: list[str]) -> None:
    """Runs both kinds in turn and prints medians and ratios."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, *rest, "--kind", kind, "--store", str(folder)]
            found[kind].append(measured(command, ENVIRONMENT))
    for name, words, scale, target in (
        ("useful", "useful part of the computed tokens", 1.0, "0.97 packed"),
        ("speed", "useful tokens per second", 1.0, f"ratio at least {SPEED_TARGET:g}"),
        ("peak", "peak MiB", MIB, f"ratio at most {MEMORY_TARGET:g}"),
    ):
        padded, packed = ([each[name] for each in found[kind]] for kind in KINDS)
        print(f"{words}: {ratio_text(padded, packed, scale)}, target: {target}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4, help="Sequences, or bins, per forward pass.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a bin, and of the longest sequence.")
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        options = (arguments.micro_batch, arguments.length, arguments.device)
        measure(arguments.kind, arguments.store, *options)
        return
    rest = ["--micro-batch", str(arguments.micro_batch), "--length", str(arguments.length)]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "train", arguments.sequences, arguments.length)
        compare(arguments.rounds, Path(folder) / "train", [*rest, "--device", arguments.device])


if __name__ == "__main__":
    main()
