"""Memory and time of forward and backward, with the logits of all tokens and with a chunk of tokens at a time.

One process per measurement loads a Llama with the shape of SmolLM-135M (random weights, float32, or --model PATH) and
computes loss and gradients of UPDATES micro-batches with the launcher's own worker code, on one thread. The kinds run
in turn. The peak is that of the process's anonymous memory (on a GPU: of allocated memory), with weights and gradients
and without optimizer states; the time is CPU time, so that other processes do not count (on a GPU: wall time).

    python benchmarks/chunked_loss.py [--rounds 5] [--micro-batch 4] [--length 1024] [--learned 1 0.5] [--model PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

from memory import ENVIRONMENT, MIB, sampled
from paired import measured, ratio_text

KINDS = ("all logits", "chunked")
UPDATES = 3
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MEMORY_TARGET, TIME_TARGET = 0.6, 1.0
"""At most these parts of the memory and time of all logits."""


def measure(kind: str, model_path: str | None, micro_batch: int, length: int, learned: float, device: str) -> None:
    """Prints the peak in bytes and the median seconds per micro-batch as JSON."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from launcher.chunked_loss import LossLayer
    from launcher.worker.batches import IGNORED
    from launcher.worker.loss import summed_loss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if model_path is None:
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    layer = LossLayer(model) if kind == "chunked" else None
    ids = torch.randint(3, model.config.vocab_size, (micro_batch, length), device=device)
    labels = torch.where(torch.rand(ids.shape, device=device) < learned, ids, IGNORED)
    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = []
    with sampled() as peak:
        for _ in range(UPDATES):
            model.zero_grad()
            start = clock()
            summed_loss(model, ids, torch.ones_like(ids), labels, layer=layer).backward()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(clock() - start)
        largest = torch.cuda.max_memory_allocated() if on_gpu else peak()
    print(json.dumps({"peak": largest, "seconds": median(seconds[1:])}))


def compare(rounds: int, learned: float, rest: list[str]) -> None:
    """Runs both kinds in turn and prints medians and ratios."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, *rest, "--learned", str(learned), "--kind", kind]
            found[kind].append(measured(command, ENVIRONMENT))
    for name, scale, target in (("peak", MIB, MEMORY_TARGET), ("seconds", 1, TIME_TARGET)):
        whole, chunked = ([each[name] for each in found[kind]] for kind in KINDS)
        print(f"learned {learned:g}  {name}: {ratio_text(whole, chunked, scale)}, target {target:g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--learned", type=float, nargs="+", default=[1.0, 0.5], help="Shares of learned tokens.")
    parser.add_argument("--model", help="A model folder instead of random weights.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = (arguments.model, arguments.micro_batch, arguments.length)
    if arguments.kind:
        measure(arguments.kind, *options, arguments.learned[0], arguments.device)
        return
    rest = ["--micro-batch", str(arguments.micro_batch), "--length", str(arguments.length)]
    rest += ["--device", arguments.device, *(["--model", arguments.model] if arguments.model else [])]
    for learned in arguments.learned:
        compare(arguments.rounds, learned, rest)


if __name__ == "__main__":
    main()
