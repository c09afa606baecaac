"""Speed of tokenising a file into a store, compared with the raw tokenizers library on the same number of threads.

The text is that of the descriptions of the installed packages, in random order; as texts, and as chats of two to six
turns. The tokenizer is --tokenizer FOLDER, or one that is trained on this text, with a ChatML template. In turn, each
in a fresh process, from the file to the store, with the loading of the tokenizer and without the imports:

- launcher: `launcher.prepare.tokenise`, with the start of its processes.
- raw: reads the lines, renders each chat once with transformers, tokenises batches with the library's own threads, and
  writes the ids; it finds no learned tokens and checks nothing. `raw, encoding` is the part of its time that the
  library's encode_batch takes.

    python benchmarks/tokenising.py [--rounds 5] [--threads 1 2] [--megabytes 40] [--tokenizer FOLDER] [--kinds chats]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BATCH = 1000
GOAL = 0.95


def paragraphs() -> list[str]:
    """The paragraphs in the descriptions of the installed packages, in a fixed order."""
    found: list[str] = []
    for package in sorted(importlib.metadata.distributions(), key=lambda one: str(one.metadata["Name"])):
        text = (package.read_text("METADATA") or "").partition("\n\n")[2]
        found += [part.strip() for part in re.split(r"\n\s*\n", text) if 80 < len(part) < 1500]
    return found


def write_rows(file: Path, kind: str, megabytes: float) -> None:
    """Writes rows of about `megabytes` MB."""
    draw, texts = random.Random(5), paragraphs()
    with file.open("w") as lines:
        while lines.tell() < megabytes * 1e6:
            lines.writelines(json.dumps(_row(kind, draw, texts)) + "\n" for _ in range(1000))


def _row(kind: str, draw: random.Random, texts: list[str]) -> dict[str, Any]:
    if kind == "texts":
        return {"text": "\n\n".join(draw.choices(texts, k=draw.choice((1, 3, 6))))}
    messages = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        question, answer = draw.choice(texts).split(". ")[0][:200], draw.choices(texts, k=draw.choice((1, 2)))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "\n\n".join(answer)}]
    return {"messages": messages}


def train_tokenizer(folder: Path) -> None:
    """Trains a byte-level BPE tokenizer on the text, and saves it with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(paragraphs(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def run_launcher(tokenizer: Path, file: Path, target: Path, threads: int) -> dict[str, float]:
    """Tokenises with the launcher's code."""
    import transformers

    from launcher.prepare.sources import DataSource
    from launcher.prepare.tokenise import TextRequest, tokenise

    assert transformers.AutoTokenizer
    request = TextRequest(DataSource((file,), "json"), None, "auto", 2048, "train", 1, processes=threads)
    with timed() as found:
        facts = tokenise(request, tokenizer, target, False, lambda **_: None)
    return {**found, "rows": facts.train.rows, "tokens": facts.train.tokens}


def run_raw(tokenizer: Path, file: Path, target: Path) -> dict[str, float]:
    """Tokenises with the tokenizers library alone."""
    import numpy as np
    from transformers import AutoTokenizer

    encoding, rows, tokens = 0.0, 0, 0
    target.mkdir()
    with (
        timed() as measured,
        file.open() as lines,
        (target / "ids").open("wb") as ids,
        (target / "lengths").open("wb") as lengths,
    ):
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        backend = loaded.backend_tokenizer
        while batch := [json.loads(line) for _, line in zip(range(BATCH), lines, strict=False)]:
            if "messages" in batch[0]:
                texts = [loaded.apply_chat_template(row["messages"], tokenize=False) for row in batch]
            else:
                texts = [row["text"] for row in batch]
            before = time.perf_counter()
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
            encoding += time.perf_counter() - before
            arrays = [np.array(one.ids, dtype=np.int32) for one in found]
            ids.write(np.concatenate(arrays).tobytes())
            counts = np.array([len(one) for one in arrays], dtype=np.int64)
            lengths.write(counts.tobytes())
            rows, tokens = rows + len(batch), tokens + int(counts.sum())
    return {**measured, "encoding": encoding, "rows": rows, "tokens": tokens}


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yields a mapping that gets the wall and CPU seconds of the block, with those of its processes."""
    found: dict[str, float] = {}
    began, before = time.perf_counter(), sum(os.times()[:4])
    yield found
    found.update(seconds=time.perf_counter() - began, cpu=sum(os.times()[:4]) - before)


def measured(way: str, tokenizer: Path, file: Path, folder: Path, threads: int) -> dict[str, float]:
    """The figures of one way, in a fresh process, with the peak memory of it and its processes in MB."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as target:
        names = [str(one) for one in (tokenizer, file, Path(target) / "store", threads)]
        command = [sys.executable, __file__, "--measure", way, *names]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, memory_of(process.pid))
                time.sleep(0.2)
            assert process.stdout is not None
            output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "memory": peak}


def memory_of(pid: int) -> float:
    """The memory of a process and its children, without files that are mapped, in MB."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found = process.memory_info()
                total += (found.rss - found.shared) / 1e6
    return total


def compare(kind: str, threads: int, rounds: int, tokenizer: Path, file: Path, folder: Path) -> None:
    """Prints the table of one kind of rows and one number of threads."""
    found: dict[str, list[dict[str, float]]] = {"launcher": [], "raw": []}
    for number in range(rounds):
        for way in sorted(found, reverse=bool(number % 2)):
            found[way].append(measured(way, tokenizer, file, folder, threads))
    rows, size = found["raw"][0]["rows"], file.stat().st_size / 1e6
    print(f"\n{kind}: {rows:,.0f} rows, {size:.0f} MB, {threads} threads, medians of {rounds} rounds")
    print(f"{'':16}{'rows/s':>10}{'tokens/s':>12}{'CPU s':>8}{'peak MB':>9}")
    for way, runs in found.items():
        _print_row(way, runs, "seconds")
    _print_row("raw, encoding", found["raw"], "encoding")
    pairs = list(zip(found["launcher"], found["raw"], strict=True))
    for title, theirs, ours in (
        (f"speed of launcher / raw (goal: {GOAL})", "seconds", "seconds"),
        ("speed of launcher / raw, encoding", "encoding", "seconds"),
        ("CPU seconds of raw / launcher", "cpu", "cpu"),
    ):
        ratios = sorted(raw[theirs] / own[ours] for own, raw in pairs)
        print(f"{title}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def _print_row(name: str, runs: list[dict[str, float]], key: str) -> None:
    rows, tokens = (median(run[what] / run[key] for run in runs) for what in ("rows", "tokens"))
    cpu, memory = (median(run[what] for run in runs) for what in ("cpu", "memory"))
    print(f"{name:16}{rows:10,.0f}{tokens:12,.0f}{cpu:8.1f}{memory:9.0f}")


def main() -> None:
    """Measures, or runs one measurement for another process."""
    if sys.argv[1:2] == ["--measure"]:
        way, tokenizer, file, target, threads = sys.argv[2:]
        places = Path(tokenizer), Path(file), Path(target)
        print(json.dumps(run_raw(*places) if way == "raw" else run_launcher(*places, int(threads))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--kinds", nargs="+", choices=("texts", "chats"), default=["texts", "chats"])
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = options.tokenizer or folder / "tokenizer"
        if options.tokenizer is None:
            train_tokenizer(tokenizer)
        for kind in options.kinds:
            file = folder / f"{kind}.jsonl"
            write_rows(file, kind, options.megabytes)
            for threads in options.threads:
                compare(kind, threads, options.rounds, tokenizer, file, folder)


if __name__ == "__main__":
    main()
