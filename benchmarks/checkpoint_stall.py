"""Seconds for which training stops while a checkpoint is saved: with and without a thread that writes it.

Two CPU ranks train a Llama with 100M parameters with the launcher's own worker code. Each round saves one checkpoint
for which training waits, makes updates, saves one in the background, and makes updates until that has its manifest. The
figures are those of the rank that waits longer: the time of `Checkpoints.save`, and in the background also that of
`Checkpoints.agree`. The first background save uses new memory and is shown apart; the others are medians.

The limited disk is imitated: each rank's writer sleeps until writing its files has taken their size divided by
LIMIT bytes per second. It writes to the same disk otherwise, and limits both kinds of saves alike.

    python benchmarks/checkpoint_stall.py [--rounds 5] [--stages 2 3] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from memory import ENVIRONMENT, RANKS, Row, make_model, plan_for

MODEL, TOKENS = "100M", 64
IDLE_UPDATES = 4
LIMIT = 100_000_000
DISKS = {"normal": None, "limited": LIMIT}
TARGET = 0.15
"""In the background, a save stops training for at most this part of the time of one for which training waits."""


class Training:
    """One rank: an engine on random tokens, and its checkpoints. All times are in seconds."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        import torch

        from launcher.plan.schema import Plan
        from launcher.run_dir import RunDir
        from launcher.worker.checkpoint import Checkpoints
        from launcher.worker.model import load_model, make_engine
        from launcher.worker.ranks import join_ranks

        self.plan = Plan.from_json((folder / "plan.json").read_text())
        self.ranks = join_ranks(self.plan)
        self.engine = make_engine(self.plan, load_model(self.plan))
        self.run = RunDir(folder / "run")
        self.checkpoints = Checkpoints(self.run, self.plan, self.ranks, lambda _: None)
        self.tokens = torch.randint(self.plan.training.model.vocab_size, (1, TOKENS))
        self.done = 0
        if limit is not None:
            slow_down(self.engine.checkpoint_engine, limit)

    def update(self) -> float:
        """Makes an update. Returns its seconds."""
        import torch

        from launcher.worker.loss import summed_loss

        started = time.perf_counter()
        for _ in range(self.plan.gradient_accumulation_steps):
            loss = summed_loss(self.engine, self.tokens, torch.ones_like(self.tokens), self.tokens)
            self.engine.backward(loss / TOKENS)
            self.engine.step()
        self.done += 1
        return time.perf_counter() - started

    def save(self, *, background: bool) -> float:
        """Saves a checkpoint. Returns the seconds for which this rank waited."""
        from launcher.worker.checkpoint import Progress

        self.checkpoints.wait()
        self.ranks.barrier()
        started = time.perf_counter()
        self.checkpoints.save(self.engine, Progress(self.done, self.done), "0" * 64, {}, background=background)
        return time.perf_counter() - started

    def round(self) -> dict[str, Any]:
        """One checkpoint of each kind."""
        idle = [self.update() for _ in range(IDLE_UPDATES)][1:]
        waits = self.save(background=False)
        idle += [self.update() for _ in range(IDLE_UPDATES)][1:]
        started = time.perf_counter()
        still, pending = self.save(background=True), []
        manifest, complete = self.run.checkpoint(self.done) / "manifest.json", False
        while not complete:
            pending.append(self.update())
            written, found = self.ranks.sum([float(self.checkpoints.written), float(manifest.exists())])
            complete = found == self.ranks.world_size
            agreeing = time.perf_counter()
            self.checkpoints.agree(written)
            still += time.perf_counter() - agreeing
        finished = time.perf_counter() - started
        return {"waits": waits, "still": still, "finished": finished, "idle": idle, "pending": pending}


def slow_down(writer: Any, limit: int) -> None:
    """Lets a writer of files take at least as long as a disk with `limit` bytes per second."""
    save: Callable[[Any, str], None] = writer.save

    def limited(state_dict: Any, path: str) -> None:
        started = time.monotonic()
        save(state_dict, path)
        time.sleep(max(0.0, Path(path).stat().st_size / limit - (time.monotonic() - started)))

    type(writer).save = lambda _, state_dict, path: limited(state_dict, path)


def rank(folder: Path, rounds: int, limit: int | None) -> None:
    """One rank. Prints its rounds as JSON, and from rank 0 the size of a checkpoint."""
    from launcher.manifest import size_of

    training = Training(folder, limit)
    training.update()
    found = [training.round() for _ in range(rounds)]
    training.checkpoints.wait()
    print(
        json.dumps({"rounds": found, "size": size_of(training.run.checkpoint(training.run.complete_checkpoints()[-1]))})
    )
    sys.stdout.flush()
    os._exit(0)


def measure(folder: Path, stage: int, rounds: int, limit: int | None) -> dict[str, Any]:
    """Runs both ranks. Returns the slower rank's seconds of every round, and the size of a checkpoint in bytes."""
    from launcher.run_dir import RunDir

    plan = plan_for(Row(MODEL, {"stage": stage}, 1, TOKENS), folder)
    (folder / "plan.json").write_text(plan.to_json())
    run = RunDir.create(folder, "run", f"{stage}-{limit}")
    (folder / "run").unlink(missing_ok=True)
    (folder / "run").symlink_to(run.path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--rank", str(folder), str(rounds), str(limit or 0)]
    processes = []
    for number in range(RANKS):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS), "MASTER_PORT": port}
        with (folder / f"rank-{number}.log").open("wb") as log:
            environment = {**os.environ, **ENVIRONMENT, **place, "MASTER_ADDR": "127.0.0.1"}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log))
    of_ranks = []
    for number, process in enumerate(processes):
        out = process.communicate()[0].decode()
        if process.returncode:
            raise SystemExit((folder / f"rank-{number}.log").read_text()[-3000:])
        of_ranks.append(json.loads(out.strip().splitlines()[-1]))
    subprocess.run(["rm", "-rf", str(run.path)], check=True)
    pairs = zip(*(one["rounds"] for one in of_ranks), strict=True)
    slower = [{key: max(one[key] for one in pair) for key in ("waits", "still", "finished")} for pair in pairs]
    updates = {key: [t for one in of_ranks[0]["rounds"] for t in one[key]] for key in ("idle", "pending")}
    return {"rounds": slower, **updates, "size": of_ranks[0]["size"]}


def show(stage: int, disk: str, found: dict[str, Any]) -> None:
    """Prints a row."""
    rounds = found["rounds"]
    first, later = rounds[0]["still"], [one["still"] for one in rounds[1:]]
    waits = [one["waits"] for one in rounds]
    cells = (
        f"ZeRO-{stage}",
        disk,
        f"{found['size'] / 1e9:.2f} GB",
        f"{median(waits):.2f} ({min(waits):.2f}-{max(waits):.2f})",
        f"{median(later):.3f} ({min(later):.3f}-{max(later):.3f})",
        f"{median(later) / median(waits):.1%}",
        f"{first:.3f} ({first / median(waits):.1%})",
        f"{median(one['finished'] for one in rounds):.1f}",
        f"{median(found['idle']):.2f} / {median(found['pending']):.2f}",
        "met" if max(first, *later) <= TARGET * median(waits) else "missed",
    )
    print("| " + " | ".join(cells) + " |", flush=True)


TITLES = (
    *("stage", "disk", "size", "waits: s", "background: s", "ratio", "first background: s", "complete after s"),
    *("s per update, without / with a pending one", f"at most {TARGET:.0%}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument(
        "--folder", type=Path, help="Where checkpoints are written. Default: the folder for temporaries."
    )
    parser.add_argument("--json", type=Path, help="Write the measured values to this file.")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        folder, rounds, limit = arguments.rank
        rank(Path(folder), int(rounds), int(limit) or None)
    os.environ.update(ENVIRONMENT)
    print("| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    measured = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        make_model(MODEL, Path(temporary))
        for stage in arguments.stages:
            for disk, limit in DISKS.items():
                found = measure(Path(temporary), stage, arguments.rounds, limit)
                show(stage, disk, found)
                measured.append({"stage": stage, "disk": disk, **found})
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
