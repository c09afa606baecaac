"""How the time of the supervisor and of the watching commands grows with the number of nodes.

Real agents without ranks answer the real supervisor's calls; a few processes contain many agents each, since one
machine has no room for 512 processes. Placement by Ray's scheduler is measured separately, on a few real Ray nodes. The
watching commands read run directories of the same numbers of nodes, with eight ranks each.

    python benchmarks/scale.py [--nodes 8 64 512] [--ray-nodes 2 4 8] [--seconds 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", DS_ACCELERATOR="cpu")

import psutil
import ray

from launcher.fleet.agent import Agent, NodeTask
from launcher.fleet.node_network import with_clock_offsets, with_interfaces
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import Node, Nodes
from launcher.fleet.preflight import Requirements, inspect_nodes
from launcher.plan.schema import World
from launcher.prepare.machine import installed_versions
from launcher.run_dir import RunDir, utc_now, write_json

LAUNCHER = str(Path(sys.executable).with_name("launcher"))
HUBS, RANKS = 4, 8
UPDATES, ROUNDS = 50_000, 5


class Hub:
    """A Ray actor that contains many agents."""

    def __init__(self, count: int) -> None:
        self.agents = [Agent() for _ in range(count)]

    def call(self, index: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self.agents[index], method)(*arguments)


class AgentInHub:
    """An agent of a hub, with the interface of a Ray actor."""

    def __init__(self, hub: Any, index: int) -> None:
        self._hub, self._index = hub, index

    def __getattr__(self, method: str) -> Any:
        hub, index = self._hub, self._index

        class Call:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return hub.call.remote(index, method, arguments)

        return Call


def simulated_nodes(count: int) -> Nodes:
    """Nodes whose agents are in a few processes on this machine."""
    hubs = min(HUBS, count)
    each = count // hubs
    # Every agent has one call that waits for events, in addition to calls that return at once.
    remote = ray.remote(Hub).options(num_cpus=1, max_concurrency=2 * each + 8)
    actors = [remote.remote(each) for _ in range(hubs)]
    nodes = Nodes(NodeResources(count, cpus=1, gpus=0), print)
    agents = [AgentInHub(actors[index % hubs], index // hubs) for index in range(count)]
    nodes.nodes = [Node(agent, f"host-{index:03d}", "127.0.0.1", (), "lo") for index, agent in enumerate(agents)]
    nodes.ask("describe", [()] * count)
    return nodes


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def supervise(count: int, seconds: float) -> dict[str, float]:
    """The seconds of the supervisor's calls to `count` nodes, and its CPU and memory use while it waits for events."""
    nodes = simulated_nodes(count)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder), "scale")
        world = World(nodes=1, processes_per_node=RANKS, device="cpu", backend="gloo", threads_per_process=1)
        required = Requirements(world, installed_versions(), 0, {}, {})
        found = {
            "ways": timed(lambda: with_interfaces(nodes.nodes)),
            "clocks": timed(lambda: with_clock_offsets(nodes.nodes)),
            # Without the all-reduce, which would take a process a node.
            "preflight": timed(lambda: inspect_nodes(nodes, required, run)),
            "start": timed(lambda: nodes.start([task(run, rank) for rank in range(count)])),
            "port": timed(lambda: nodes.free_port(0)),
            "order": timed(lambda: nodes.order({"go": {"env": {}, "start": None}})),
        }
        process = psutil.Process()
        before, began = process.cpu_times(), time.perf_counter()
        while time.perf_counter() - began < seconds:
            nodes.reports(0.5)
        after, lasted = process.cpu_times(), time.perf_counter() - began
        busy = after.user + after.system - before.user - before.system
        found |= {"cpu_percent": 100 * busy / lasted, "rss_mib": process.memory_info().rss / 1024**2}
        found["end"] = timed(lambda: nodes.end(0.0))
    for actor in {id(node.agent._hub): node.agent._hub for node in nodes.nodes}.values():
        ray.kill(actor)
    return found


def task(run: RunDir, rank: int) -> NodeTask:
    return NodeTask(
        node_rank=rank,
        first_rank=rank * RANKS,
        processes=0,
        world_size=0,
        run_dir=str(run.path),
        log_folder=str(run.node_logs(rank, f"host-{rank:03d}")),
        environment={},
        arguments=(),
    )


def place(count: int) -> float:
    """The seconds to place one agent on each of `count` real Ray nodes, which are already running."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = Nodes(NodeResources(count, cpus=1, gpus=0), print)
        return timed(lambda: nodes.place(120.0))
    finally:
        ray.shutdown()
        cluster.shutdown()


def watch(count: int) -> dict[str, float]:
    """The median seconds of each watching command on a run with `count` nodes."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder), "scale")
        write_run(run, count)
        commands = {
            "status": ("status", str(run.path)),
            "status --json": ("status", str(run.path), "--json"),
            "logs --tail 100": ("logs", str(run.path), "--tail", "100"),
            "why": ("why", str(run.path)),
        }
        return {
            name: median(timed(partial(command, *words)) for _ in range(ROUNDS)) for name, words in commands.items()
        }


def command(*words: str) -> None:
    subprocess.run([LAUNCHER, *words], stdout=subprocess.DEVNULL, check=True)


def write_run(run: RunDir, count: int) -> None:
    """Writes a run that failed after many updates; the first failed rank is on the last node."""
    run.enter("training")
    lines = (
        {"update": n, "samples": n, "tokens": 1, "loss": 2.0, "lr": 1e-5, "step_seconds": 0.5, "tokens_per_second": 9.0}
        for n in range(UPDATES)
    )
    run.metrics_file.write_text("".join(json.dumps({**line, "time": utc_now()}) + "\n" for line in lines))
    for node in range(count):
        host = f"host-{node:03d}"
        folder = run.node_logs(node, host)
        folder.mkdir(parents=True)
        facts = {"address": "10.0.0.1", "interface": "eth0", "gpus": [], "clock_offset_seconds": 0}
        run.event({"event": "node", "node_rank": node, "host": host, **facts})
        write_json(folder / "node.json", heartbeat(node, host))
        for rank in range(node * RANKS, (node + 1) * RANKS):
            (folder / f"rank-{rank}.log").write_text("".join(f"{utc_now()} line {n}\n" for n in range(200)))
    failures = [
        {"rank": rank, "node_rank": rank // RANKS, "host": f"host-{rank // RANKS:03d}", "time": time.time()}
        | {
            "how": "exit code 1",
            "error": "ValueError: bad",
            "traceback": f"Traceback\n  in rank {rank}\nValueError: bad",
        }
        for rank in reversed(range(count * RANKS))
    ]
    first = {key: failures[0][key] for key in ("rank", "node_rank", "host", "how", "error")}
    run.event({"event": "failure", **first, "failures": failures})
    run.enter("failed", reason="a rank failed")


def heartbeat(node: int, host: str) -> dict[str, Any]:
    rank = {"local_rank": 0, "pid": 1, "alive": True, "exit_code": None, "phase": None, "updates": UPDATES}
    times = {
        "step_seconds": 0.5,
        "own_seconds": 0.2,
        "memory_bytes": 1,
        "gpu_memory_used_bytes": None,
        "time": utc_now(),
    }
    facts = {"time": utc_now(), "node_rank": node, "host": host, "address": "10.0.0.1", "interface": "eth0", "cpus": 64}
    use = {"cpu_percent": 50.0, "memory_used_bytes": 1, "memory_bytes": 2, "gpus": [], "ended": False}
    return {**facts, **use, "ranks": [{"rank": node * RANKS + local, **rank, **times} for local in range(RANKS)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--ray-nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[int, Any]] = {"watch": {}, "supervise": {}, "place": {}}
    for count in options.nodes:
        found["watch"][count] = show(f"{count} nodes, watched, seconds", watch(count))
    ray.init(num_cpus=HUBS, include_dashboard=False, log_to_driver=False)
    for count in options.nodes:
        found["supervise"][count] = show(f"{count} nodes, supervised, seconds", supervise(count, options.seconds))
    ray.shutdown()
    for count in options.ray_nodes:
        found["place"][count] = show(f"{count} real Ray nodes, seconds", {"place": place(count)})
    if options.json:
        write_json(options.json, {"cpus": os.cpu_count(), "updates": UPDATES, "ranks": RANKS, **found})


def show(title: str, figures: dict[str, float]) -> dict[str, float]:
    print(f"{title:36}" + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    return figures


if __name__ == "__main__":
    main()
