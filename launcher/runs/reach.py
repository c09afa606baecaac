"""Whether this machine can reach the nodes that a job asks for."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job import AnyJob
from launcher.job.schema import ClusterSection
from launcher.job.user_path import user_path
from launcher.plan.facts import MachineFacts


def check_reach(job: AnyJob, machine: MachineFacts) -> None:
    """Raises RequestError if this machine cannot reach the nodes of the job."""
    from launcher.fleet.nodes import address_of

    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        found = "Ray is already initialised in this process, and a run needs a connection of its own"
        hint = "call ray.shutdown() first, or start the run in another process with launcher run"
        raise RequestError(Problem(found, hint=hint))
    cluster, address = job.cluster, address_of(job.cluster.address)
    if address == "local":
        _check_this_machine(cluster, machine)
    elif address.startswith(("http://", "https://")):
        raise RequestError(
            Problem(
                f"{address} is the address of a Ray dashboard",
                key="cluster.address",
                hint="give the address of the Ray head, host:6379, or unset RAY_ADDRESS",
            )
        )
    elif cluster.gpus_per_node == "auto" and not machine.gpus:
        raise RequestError(
            Problem(
                f"auto counts GPUs on this machine, which has none; nodes of the Ray cluster at {address} may differ",
                key="cluster.gpus_per_node",
                hint="set the number of GPUs per node; 0 trains on CPUs",
            )
        )
    if "runtime_resources/working_dir" in str(Path.cwd()) and not user_path(job.output_dir, "output_dir").is_absolute():
        raise RequestError(
            Problem(
                f"{job.output_dir} is in the working directory of a Ray job, which Ray removes when the job ends",
                key="output_dir",
                hint="give an absolute path on storage that all nodes share",
            )
        )


def _check_this_machine(cluster: ClusterSection, machine: MachineFacts) -> None:
    hint = "give the address of a Ray cluster in cluster.address or RAY_ADDRESS"
    if cluster.nodes > 1:
        found = f"the job asks for {cluster.nodes} nodes, and only this machine is available"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))
    if cluster.spare_nodes:
        found = f"the job asks for {cluster.all_nodes} nodes, spare nodes included, and only this machine is available"
        raise RequestError(Problem(found, key="cluster.spare_nodes", hint=hint))
    if cluster.gpus_per_node != "auto" and cluster.gpus_per_node > machine.gpus:
        found = f"the job asks for {cluster.gpus_per_node} GPUs per node, and this machine has {machine.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=hint))
