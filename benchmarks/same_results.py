"""Shows that a change keeps losses, learning rates and speed: the same jobs with two versions of the launcher, in turn.

    python benchmarks/same_results.py [REVISION] [--rounds 3] [--only NAME] [--json FILE]

REVISION is a git revision (default: HEAD~1) that is checked out beside the working tree. Every job runs on two CPU
ranks. Losses, learning rates, gradient norms and evaluations must be equal to the last bit. The time per update is the
median over the updates of a run, and its ratio is between runs of the same round. Exit status 1 if a number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiny_models import make_tiny_model, write_chats  # noqa: E402

COMPARED = ("loss", "lr", "grad_norm", "tokens", "samples")
UPDATES, SKIPPED = 24, 4
JOBS: dict[str, dict[str, Any]] = {
    "ZeRO-0, linear": {"deepspeed": {"zero_optimization": {"stage": 0}}},
    "ZeRO-1, cosine, accumulation": {
        "deepspeed": "zero1",
        "schedule": {"shape": "cosine"},
        "train": {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 8},
    },
    "ZeRO-2, step": {"deepspeed": "zero2", "schedule": {"shape": "step", "decay_at": [0.5]}},
    "ZeRO-3, LoRA": {"deepspeed": "zero3", "model": {"lora": {"r": 4}}},
    "ZeRO-2, frozen, log warm-up": {
        "deepspeed": "zero2",
        "model": {"freeze": ["model.embed_tokens"]},
        "schedule": {"shape": "cosine", "warmup_type": "log", "allow_unsafe": True},
    },
}
"""What differs from the base job: every ZeRO stage, a generated scheduler object, adapters, frozen weights."""


def base_job(folder: Path) -> dict[str, Any]:
    return {
        "name": "same",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "chats.jsonl"), "eval": 0.1, "max_length": 64},
        "train": {"max_steps": UPDATES, "eval_every": 8, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 4},
        "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
        "export": False,
        "checkpoint": {"save_final": False},
    }


def job_of(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    job = base_job(folder)
    for name, value in changes.items():
        merged = isinstance(value, dict) and name != "deepspeed"
        job[name] = {**job.get(name, {}), **value} if merged else value
    return job


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A temporary work tree of the revision."""
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(tree), revision], check=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def run(tree: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs the job with the launcher of a work tree; returns its numbers per update, its evaluations and its speed."""
    folder.mkdir(parents=True)
    job = {**job, "output_dir": str(folder / "runs"), "data": {**job["data"], "cache_dir": str(folder / "cache")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "launcher", "run", "job.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{tree}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    (directory,) = (folder / "runs").glob("same-*")
    updates, evaluations = (lines(directory / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    return {
        "updates": [{key: line.get(key) for key in COMPARED} for line in updates],
        "evaluations": [line["loss"] for line in evaluations],
        "seconds": median(line["step_seconds"] for line in updates[SKIPPED:]),
    }


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first number that differs; None if none does."""
    for name in ("updates", "evaluations"):
        if len(before[name]) != len(after[name]):
            return f"{len(before[name])} {name} before, {len(after[name])} after"
        for place, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            if old != new:
                return f"{name[:-1]} {place}: {old} before, {new} after"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD~1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="jobs whose name contains this text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jobs = {name: changes for name, changes in JOBS.items() if options.only is None or options.only in name}
    results, failed = {}, False
    with checked_out(options.revision) as tree, tempfile.TemporaryDirectory(prefix="same-results-") as name:
        folder = Path(name)
        make_tiny_model(folder / "model", hidden=64)
        write_chats(folder / "chats.jsonl", 120)
        print(f"{'job':32} {'numbers':>22} {'s/update before':>16} {'after':>8} {'ratio':>7}")
        for title, changes in jobs.items():
            job, ratios, pairs = job_of(folder, changes), [], []
            for number in range(options.rounds):
                order = [("before", tree), ("after", ROOT)]
                place = folder / title.replace(" ", "-").replace(",", "") / str(number)
                done = {side: run(source, job, place / side) for side, source in order[:: -1 if number % 2 else 1]}
                pairs.append(done)
                ratios.append(done["after"]["seconds"] / done["before"]["seconds"])
            found = next((text for pair in pairs if (text := difference(pair["before"], pair["after"]))), None)
            failed = failed or found is not None
            before, after = (median(pair[side]["seconds"] for pair in pairs) for side in ("before", "after"))
            count = len(pairs[0]["after"]["updates"])
            words = f"{count} updates equal" if found is None else "DIFFERENT"
            print(f"{title:32} {words:>22} {before:16.4f} {after:8.4f} {median(ratios):7.3f}")
            if found:
                print(f"    {found}")
            results[title] = {"difference": found, "updates": count, "before": before, "after": after, "ratios": ratios}
    if options.json:
        options.json.write_text(json.dumps({"revision": options.revision, "results": results}, indent=2) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
