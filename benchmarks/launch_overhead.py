"""Time to the first update and time per update of `launcher run`, compared with torchrun and the `deepspeed` launcher.

The others run plain_script.py, which does the same updates from the same plan; the benchmark checks that the losses are
equal. Each round runs all of them in turn, on two CPU ranks with one thread each, and a ratio compares runs of the same
round. The launcher's time includes planning; the data is tokenised before for all.

The figures are valid only on an otherwise idle machine: Linux distributes busy CPUs by session (autogroup), and the
launchers create different numbers of sessions. The CPU use before each run is measured and printed.

    python benchmarks/launch_overhead.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import yaml

BIN = Path(sys.executable).parent
PLAIN_SCRIPT = Path(__file__).with_name("plain_script.py")
RANKS, WARM_UPDATES = 2, 20
BUSY_PERCENT = 5.0
FRESH, JOINED, TORCHRUN, DEEPSPEED = "launcher, fresh Ray", "launcher, running Ray", "torchrun", "deepspeed"
TARGETS = {
    ("update", FRESH, TORCHRUN): 1.01,
    ("update", JOINED, TORCHRUN): 1.01,
    ("first", JOINED, DEEPSPEED): 0.70,
    ("first", JOINED, TORCHRUN): 0.90,
    ("first", FRESH, DEEPSPEED): 1.00,
}
TITLES = {
    "first": "seconds to the first update",
    "update": "seconds per update",
    "quick": "seconds per update, 10th percentile of each run",
}
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """One run: `first` is the time from its start to the end of its first update, in seconds.

    `update` is the median and `quick` the 10th percentile of the seconds per update, after the warm-up updates.
    `busy_percent` is the CPU use before the run.
    """

    first: float
    update: float
    quick: float
    busy_percent: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """A way to start the ranks. `command` gets the folder for its metrics; `around` yields environment variables."""

    name: str
    command: Callable[[Path], list[str]]
    around: Callable[[], AbstractContextManager[Environment]]


def base_environment() -> dict[str, str]:
    """The variables of all runs. Python writes bytecode, as for packages that pip installs."""
    dropped = ("RAY_", "PYTHONDONTWRITEBYTECODE", "LAUNCHER_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    settings = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **settings, "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "PATH": path}


def make_model(folder: Path) -> None:
    """A Llama whose update takes about 50 ms on a core, with a byte tokenizer."""
    import torch
    from byte_tokenizer import save_byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary_size = save_byte_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_job(folder: Path, updates: int) -> Path:
    """Writes the job of all runs, its model and its data to `folder`. Nothing is evaluated, saved or exported."""
    make_model(folder / "model")
    rows = ({"text": " ".join(f"{n * k % 97} times {k}" for k in range(20))} for n in range(256))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "name": "overhead",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "text.jsonl"), "max_length": 128, "cache_dir": str(folder / "cache")},
        "train": {"max_steps": updates, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
        "schedule": {"shape": "linear", "peak_lr": 1e-4, "warmup": 10, "allow_unsafe": True},
        "deepspeed": "zero2",
        "cluster": {"processes_per_node": RANKS, "gpus_per_node": 0},
        "checkpoint": {"save_final": False},
        "export": False,
        "output_dir": str(folder / "runs"),
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def contenders(job: Path, plan: Path) -> list[Contender]:
    def plain(*launch: str) -> Callable[[Path], list[str]]:
        def command(out: Path) -> list[str]:
            return [*launch, f"--master_port={free_port()}", str(PLAIN_SCRIPT), str(plan), str(out / "plain.jsonl")]

        return command

    def ours(out: Path) -> list[str]:
        return [str(BIN / "launcher"), "run", str(job), f"output_dir={out}"]

    alone = nullcontext[Environment]({})
    return [
        Contender(TORCHRUN, plain(str(BIN / "torchrun"), f"--nproc_per_node={RANKS}"), lambda: alone),
        Contender(DEEPSPEED, plain(str(BIN / "deepspeed"), f"--num_gpus={RANKS}"), lambda: alone),
        Contender(FRESH, ours, lambda: alone),
        Contender(JOINED, ours, ray_already_up),
    ]


def measure(contender: Contender, folder: Path) -> Measured:
    """One run of the contender in `folder`."""
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    with contender.around() as variables, log.open("wb") as output:
        busy = psutil.cpu_percent(interval=2.0)
        start = time.time()
        status = subprocess.run(
            contender.command(folder),
            env={**base_environment(), **variables},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode
    if status:
        raise SystemExit(f"{contender.name} ended with status {status}:\n{log.read_text()[-3000:]}")
    (file,) = [*folder.glob("plain.jsonl"), *folder.glob("*/metrics.jsonl")]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line["step_seconds"] for line in lines[WARM_UPDATES:]]
    return Measured(
        first=_seconds(lines[0]["time"]) - start,
        update=median(steps),
        quick=quantiles(steps, n=10)[0],
        busy_percent=busy,
        losses=tuple(line["loss"] for line in lines),
    )


def _seconds(moment: str | float) -> float:
    return moment if isinstance(moment, float) else datetime.fromisoformat(moment).timestamp()


def check_same_updates(found: Mapping[str, Measured]) -> None:
    """Raises SystemExit unless the losses of all contenders are equal."""
    expected = found[TORCHRUN].losses
    for name, measured in found.items():
        off = max(abs(a - b) / b for a, b in zip(measured.losses, expected, strict=True))
        if off > 1e-4:
            raise SystemExit(f"{name} and {TORCHRUN} do different updates: their losses differ by {off:.1e}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_already_up() -> Iterator[Environment]:
    """Starts a Ray on this machine; yields the variables for joining it, and ends it by process id."""
    with tempfile.TemporaryDirectory(prefix="lo-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        token = Path(temporary) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        port = free_port()
        ports = [f"--{name}={free_port()}" for name in ("ray-client-server-port", "dashboard-agent-listen-port")]
        command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
        options = [f"--temp-dir={temporary}", f"--num-cpus={RANKS}", "--include-dashboard=false"]
        with (Path(temporary) / "head.log").open("wb") as log:
            head = subprocess.Popen(
                [*command, *ports, *options],
                env={**base_environment(), **auth},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_up(head, Path(temporary) / "head.log")
            _wait_until_idle(head)
            yield {**auth, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            _end_tree(head)


def _wait_until_up(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"Ray did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def _wait_until_idle(head: subprocess.Popen[bytes]) -> None:
    """Waits until Ray has started its idle processes."""
    before, now = -1.0, 0.0
    while now - before > 0.15:
        time.sleep(1.0)
        before, now = now, _processor_seconds(head.pid)


def _processor_seconds(pid: int) -> float:
    """The CPU seconds of the child processes of `pid` so far."""
    spent = 0.0
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def _end_tree(head: subprocess.Popen[bytes]) -> None:
    """Ends a process and all its child processes."""
    started = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(head.pid), *started], timeout=15)
    for process in alive:
        process.kill()
    head.wait()


def time_command(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=base_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def ratio(rounds: Sequence[Mapping[str, Measured]], what: str, name: str, other: str) -> list[float]:
    """The seconds of `name` divided by those of `other`, for each round."""
    return [getattr(found[name], what) / getattr(found[other], what) for found in rounds]


def report(rounds: Sequence[Mapping[str, Measured]], commands: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """All figures, in seconds or as ratios: median, minimum and maximum."""
    seconds = {
        what: {name: _spread([getattr(found[name], what) for found in rounds]) for name in rounds[0]} for what in TITLES
    }
    ratios = [
        {
            "of": what,
            "name": name,
            "against": other,
            "aim": TARGETS.get((what, name, other)),
            **_spread(ratio(rounds, what, name, other)),
        }
        for what in TITLES
        for name in (FRESH, JOINED)
        for other in (TORCHRUN, DEEPSPEED)
    ]
    return {
        "rounds": len(rounds),
        "busy_percent": _spread([measured.busy_percent for found in rounds for measured in found.values()]),
        "seconds": seconds,
        "ratios": ratios,
        "commands": {name: _spread(times) for name, times in commands.items()},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def show(figures: Mapping[str, Any]) -> None:
    busy = figures["busy_percent"]
    if busy["max"] > BUSY_PERCENT:
        print(f"INVALID: other processes used {busy['median']:.0f}% of the CPUs (up to {busy['max']:.0f}%)")
    for what, title in TITLES.items():
        print(f"\n{title}, median of {figures['rounds']} (min-max)")
        for name, row in figures["seconds"][what].items():
            print(f"  {name:<24} {row['median']:8.4f}  ({row['min']:.4f}-{row['max']:.4f})")
        for row in figures["ratios"]:
            if row["of"] == what:
                aim = f"   target {row['aim']:.2f}" if row["aim"] else ""
                spread = f"{row['median']:6.3f}  ({row['min']:.3f}-{row['max']:.3f})"
                print(f"  {row['name']:<24} / {row['against']:<10} {spread}{aim}")
    print("\nseconds of commands that start no run")
    for name, row in figures["commands"].items():
        print(f"  {name:<24} {row['median']:8.4f}  ({row['min']:.4f}-{row['max']:.4f})")


def run_rounds(folder: Path, count: int, updates: int) -> dict[str, Any]:
    job = write_job(folder, updates)
    launcher, plan = str(BIN / "launcher"), folder / "plan.json"
    subprocess.run([launcher, "plan", str(job)], env=base_environment(), stdout=subprocess.DEVNULL, check=True)
    text = subprocess.check_output([launcher, "plan", str(job), "--json"], env=base_environment())
    plan.write_bytes(text)
    rounds: list[dict[str, Measured]] = []
    commands: dict[str, list[float]] = {"launcher --help": [], "launcher plan": []}
    for number in range(count):
        found: dict[str, Measured] = {}
        turns = contenders(job, plan)
        # Each round starts with another contender, so that none always has the same position.
        first = number % len(turns)
        for contender in turns[first:] + turns[:first]:
            place = folder / f"round-{number}" / contender.name.replace(", ", "-").replace(" ", "-")
            found[contender.name] = measure(contender, place)
            print(f"round {number + 1}  {contender.name:<24} {found[contender.name].first:7.3f} s", file=sys.stderr)
        check_same_updates(found)
        rounds.append(found)
        commands["launcher --help"].append(time_command(launcher, "--help"))
        commands["launcher plan"].append(time_command(launcher, "plan", str(job)))
    return report(rounds, commands)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time to the first update and per update, compared with other launchers"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default 5)")
    parser.add_argument("--updates", type=int, default=150, help=f"updates per run, more than {WARM_UPDATES}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overhead-", ignore_cleanup_errors=True) as folder:
        figures = run_rounds(Path(folder), options.rounds, options.updates)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
