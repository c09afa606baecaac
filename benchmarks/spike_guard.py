"""How runs with too high a learning rate end under `schedule.on_spike`: warn, extend_warmup and lower_peak.

A base model is trained on Python sources with a suitable learning rate, and fine-tuned on Python's documentation with
several peaks and every remedy, by the launcher's own worker (launcher.worker.train.Training) as a single rank. The
model is a byte-level OPT with four layers of width 48 that normalises after each block, like OPT-350m: such models are
known to diverge suddenly at a high learning rate. A Llama of that size does not: with these texts it only learns less,
up to thirty times its best learning rate.

Findings, on two shared CPU cores (240 updates, warm-up 80, five seeds; the evaluation before training is 2.50 nats, and
a run that ends above it has diverged; spike_guard.json contains the results, with the losses of the warn runs):
- 0.005 and 0.02: no run breaks, the detector reports no spike, and the remedies change nothing;
- 0.03: all runs diverge with warn (median 2.84) and with extend_warmup (3.12); with lower_peak one in five (2.38);
- 0.04: all diverge with warn (3.23) and with extend_warmup (3.25); with lower_peak three in five (2.53);
- so a longer warm-up alone does not help if the peak is too high: it leads back to the same peak, and from about half
  of the run it cannot lower the learning rate at all; the same warm-up to half the peak does help;
- the loss recovers only partly: the best final loss with lower_peak is 2.21, and with a good peak it is 1.88;
- the detector found all ten runs that broke, 17 to 54 updates (median 21.5) after the break as determined afterwards,
  without a false alarm in the 2,400 updates of the runs that did not break.

    python benchmarks/spike_guard.py [--quick] [--seeds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.run_dir import RunDir

PEAKS = (0.005, 0.02, 0.03, 0.04)
REMEDIES = ("warn", "extend_warmup", "lower_peak")
BASE_UPDATES, BASE_LR = 400, 2e-3
UPDATES, WARMUP, BATCH, CHARACTERS = 240, 80, 16, 62
ONSET_RISE, ONSET_SPAN = 0.3, 16
"""A run breaks, as determined afterwards, where the mean of the next ONSET_SPAN losses is ONSET_RISE nats above the
lowest such mean before."""


@dataclass(frozen=True)
class Outcome:
    """The result of one run. Losses are in nats per byte; `final` is None if the run stopped itself."""

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
        """Whether the run stopped because of a NaN or Inf loss, or ended with a loss above the initial one."""
        return self.final is None or not self.final < self.first

    @property
    def onset(self) -> int | None:
        """The update at which the loss rises for long or for good; None if it never does."""
        means = [fmean(self.losses[u : u + ONSET_SPAN]) for u in range(len(self.losses) - ONSET_SPAN + 1)]
        risen = (u for u in range(ONSET_SPAN, len(means)) if means[u] > min(means[: u - ONSET_SPAN + 1]) + ONSET_RISE)
        return next(risen, None)


def write_texts(folder: Path) -> None:
    """Writes code.jsonl and docs.jsonl for training, and docs-eval.jsonl from the last tenth of the documentation."""
    from pydoc_data.topics import topics

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = "".join(file.read_text(errors="ignore") for file in sources)
    docs = "\n".join(topics.values())
    cut = len(docs) * 9 // 10
    for name, text, count in (("code", code, 8000), ("docs", docs[:cut], 6000), ("docs-eval", docs[cut:], 256)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in pieces(text, count)))


def pieces(text: str, count: int) -> Iterable[str]:
    """Pieces of the text's ASCII characters, from random positions."""
    plain, draw = text.encode("ascii", "ignore").decode(), random.Random(0)
    starts = (draw.randrange(len(plain) - CHARACTERS) for _ in range(count))
    return (plain[start : start + CHARACTERS] for start in starts)


def make_model(folder: Path) -> None:
    """Saves the untrained model, with a byte tokenizer."""
    import torch
    from byte_tokenizer import save_byte_tokenizer
    from transformers import OPTConfig, OPTForCausalLM

    vocabulary_size = save_byte_tokenizer(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary_size,
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


def begin_process() -> None:
    """Makes this process the single rank of all its runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quiet = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update(place | quiet)
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)


def carry_out(job: dict[str, Any]) -> RunDir:
    """Runs a job in this process as its only rank; returns the run directory."""
    from launcher.job import load_job
    from launcher.records import RankEvent
    from launcher.run_dir import RunDir, write_atomic
    from launcher.runs.planning import make_plan
    from launcher.worker.control import Control
    from launcher.worker.train import run_rank

    class RecordingControl(Control):
        """The control of a rank without an agent: writes the events that the supervisor would write."""

        def record_event(self, event: RankEvent) -> None:
            run.event(event)

    plan = make_plan(load_job(job))
    run = RunDir.create(Path(job["output_dir"]), job["name"])
    write_atomic(run.plan_file, plan.to_json())
    run_rank(run.path, run.plan_file, None, RecordingControl(None))
    return run


def make_base(folder: Path) -> Path:
    """Trains the model that is fine-tuned, on code with a suitable learning rate."""
    train = {"max_steps": BASE_UPDATES, "seed": 0}
    run = carry_out(job_dict(folder, "untrained", "code", train, {"peak_lr": BASE_LR, "warmup": 100}))
    return run.export.rename(folder / "base")


def fine_tune(folder: Path, peak: float, seed: int, remedy: str) -> Outcome:
    start = time.monotonic()
    train = {"max_steps": UPDATES, "seed": seed}
    schedule = {"peak_lr": peak, "warmup": WARMUP, "on_spike": remedy}
    run = carry_out(job_dict(folder, "base", "docs", train, schedule))
    lines, evaluations, events = run.metrics(), run.evaluations(), run.events()
    extended = tuple(event["update"] for event in events if event["event"] == "warmup_extended")
    if len(extended) != len(run.plan_revisions()):
        raise RuntimeError(f"{len(run.plan_revisions())} plan revisions and {len(extended)} warmup_extended events")
    return Outcome(
        peak,
        seed,
        remedy,
        first=float(evaluations[0]["loss"]),
        final=float(evaluations[-1]["loss"]) if len(evaluations) > 1 else None,
        losses=tuple(float(line["loss"]) for line in lines),
        norms=tuple(float(line["grad_norm"]) for line in lines),
        spikes=tuple(event["update"] for event in events if event["event"] == "spike"),
        extended=extended,
        seconds=time.monotonic() - start,
    )


def run_all(folder: Path, peaks: Sequence[float], seeds: int, processes: int) -> list[Outcome]:
    """Runs every peak, seed and remedy, in several processes at once."""
    write_texts(folder)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=begin_process) as pool:
        pool.submit(make_model, folder / "untrained").result()
        pool.submit(make_base, folder).result()
        wanted = [(peak, seed, remedy) for peak in peaks for seed in range(1, seeds + 1) for remedy in REMEDIES]
        found = []
        for future in as_completed([pool.submit(fine_tune, folder, *one) for one in wanted]):
            found.append(outcome := future.result())
            name = f"peak {outcome.peak:g}  seed {outcome.seed}  {outcome.remedy:<14}"
            print(f"{name} {shown(outcome.final)}  {outcome.seconds:.1f} s", file=sys.stderr)
    return sorted(found, key=lambda o: (o.peak, REMEDIES.index(o.remedy), o.seed))


def shown(loss: float | None) -> str:
    return "stopped" if loss is None else f"{loss:.3f}"


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per peak and remedy. In the median of the final losses, a run that stopped counts as infinite."""
    rows = []
    for peak, remedy in dict.fromkeys((o.peak, o.remedy) for o in outcomes):
        group = [o for o in outcomes if (o.peak, o.remedy) == (peak, remedy)]
        finals = sorted(math.inf if o.final is None or math.isnan(o.final) else o.final for o in group)
        rows.append(
            {
                "peak": peak,
                "remedy": remedy,
                "runs": len(group),
                "median": median(finals),
                "least": finals[0],
                "most": finals[-1],
                "diverged": fmean(o.diverged for o in group),
                "extended": [list(o.extended) for o in group],
            }
        )
    return rows


def detection(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per peak, for the runs without a remedy: when they broke, and when the detector reported it."""
    rows = []
    for peak in dict.fromkeys(o.peak for o in outcomes):
        group = [o for o in outcomes if o.peak == peak and o.remedy == "warn"]
        false = sum(o.onset is None or s < o.onset for o in group for s in o.spikes)
        broken = [(o.onset, [s for s in o.spikes if s >= o.onset]) for o in group if o.onset is not None]
        delays = [after[0] - onset for onset, after in broken if after]
        rows.append(
            {
                "peak": peak,
                "runs": len(group),
                "updates": sum(len(o.losses) for o in group),
                "broke": len(broken),
                "told": len(delays),
                "delays": delays,
                "false_alarms": false,
            }
        )
    return rows


def as_written(outcome: Outcome) -> dict[str, Any]:
    """A run as JSON types; losses and norms only of the runs with warn, to four decimals."""
    series = {
        name: [round(value, 4) for value in getattr(outcome, name)] if outcome.remedy == "warn" else []
        for name in ("losses", "norms")
    }
    return {**asdict(outcome), **series}


def show(outcomes: Sequence[Outcome]) -> None:
    print(f"\nevaluation before training: {outcomes[0].first:.3f} nats per byte")
    print(f"{'peak':>7}  {'remedy':<14} {'median':>7} {'min':>7} {'max':>7} {'diverged':>9}  extended at, per run")
    for row in summary(outcomes):
        extended = "; ".join(", ".join(map(str, at)) or "-" for at in row["extended"])
        finals = f"{row['median']:7.3f} {row['least']:7.3f} {row['most']:7.3f} {row['diverged']:9.0%}"
        print(f"{row['peak']:7g}  {row['remedy']:<14} {finals}  {extended}")
    print(f"\n{'peak':>7}  {'runs':>4}  {'broke':>5}  {'found':>5}  {'false alarms':>12}  updates from break to alarm")
    for row in detection(outcomes):
        counts = f"{row['runs']:>4}  {row['broke']:>5}  {row['told']:>5}  {row['false_alarms']:>12}"
        print(f"{row['peak']:7g}  {counts}  {', '.join(map(str, row['delays'])) or '-'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How runs with too high a learning rate end under each on_spike setting"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, and only the lowest and the highest peak")
    parser.add_argument("--seeds", type=int, help="runs per peak and remedy (default 5; with --quick 2)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at once (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and all runs to FILE")
    options = parser.parse_args()
    peaks = (PEAKS[0], PEAKS[-1]) if options.quick else PEAKS
    with tempfile.TemporaryDirectory(prefix="spikes-", ignore_cleanup_errors=True) as folder:
        outcomes = run_all(Path(folder), peaks, options.seeds or (2 if options.quick else 5), options.processes)
    show(outcomes)
    if options.json:
        figures = {"summary": summary(outcomes), "detection": detection(outcomes)}
        options.json.write_text(json.dumps({**figures, "runs": [as_written(o) for o in outcomes]}) + "\n")


if __name__ == "__main__":
    main()
