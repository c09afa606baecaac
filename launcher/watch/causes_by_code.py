"""The causes of the launcher's own failures, by code."""

from __future__ import annotations

from launcher.errors import FailureCode
from launcher.watch.causes_by_message import ALLOCATION_FAILED, Cause, cause_named, find_cause

_LOWER = "launcher resume RUN schedule.peak_lr=…"


def _cause(code: FailureCode, name: str, hint: str, hint_single_node: str | None = None) -> tuple[FailureCode, Cause]:
    return code, Cause(name, hint, code, hint_single_node)


CAUSE_BY_CODE = dict(
    (
        (FailureCode.VERSIONS_DIFFER, cause_named("versions differ")),
        (FailureCode.NODE_LOST, cause_named("a node failed")),
        (FailureCode.NAN_LOSS, cause_named("the loss is NaN or Inf")),
        (FailureCode.WEIGHTS_DIFFER, cause_named("weights do not match the model")),
        _cause(
            FailureCode.PLAN_DAMAGED,
            "plan.json is not what the launcher wrote",
            "restore plan.json from a copy, or resume with the launcher version that wrote it; to change the job, give "
            "overrides to launcher resume, never edit the plan",
        ),
        _cause(
            FailureCode.PLAN_DIFFERS,
            "the ranks have different plans",
            "output_dir must be on storage that all nodes share, and every node must have the same launcher version",
        ),
        _cause(
            FailureCode.DATA_DIFFERS,
            "a node's data differs from the planned data",
            "give every node the same data files and tokenizer, or put the data on storage that all nodes share",
        ),
        _cause(
            FailureCode.NODE_UNFIT,
            "a node does not have what the job requests",
            "exclude that node (slurm.exclude), or check its GPUs and driver (nvidia-smi)",
            "check its GPUs and driver (nvidia-smi), or request fewer GPUs (cluster.gpus_per_node)",
        ),
        _cause(
            FailureCode.NODE_FAULTY,
            "a GPU or node is faulty",
            "exclude that node (slurm.exclude) until its GPU is reset, repaired or replaced; launcher doctor repeats "
            "the checks (docs/health.md)",
            "reset the GPU (nvidia-smi --gpu-reset), reboot, or replace it; launcher doctor repeats the checks "
            "(docs/health.md)",
        ),
        _cause(
            FailureCode.PACKAGE_MISSING,
            "a Python package is missing",
            "install it in the Python that the ranks run in, on every node",
        ),
        _cause(
            FailureCode.NOT_SHARED,
            "a file or folder is missing",
            "it must be on storage that all nodes see, under the same path on each of them",
        ),
        _cause(
            FailureCode.NOT_ENOUGH_NODES,
            "there are not enough nodes",
            "request fewer nodes or ranks, wait longer (cluster.wait_seconds), or free some nodes",
        ),
        _cause(
            FailureCode.NODE_DRAINED,
            "Ray drained a node before its end: a preemption, or ray drain-node",
            "continue with launcher resume when there are enough nodes, or set cluster.min_nodes",
        ),
        _cause(
            FailureCode.RAY_LOST,
            "Ray could not be reached, or its head process ended",
            "check that Ray's head process (gcs_server) runs and that cluster.address is its address; its log and the "
            "head node's kernel log (dmesg) show why it ended. Then continue with launcher resume, or launcher run if "
            "nothing was saved",
        ),
        _cause(
            FailureCode.SUPERVISOR_LOST,
            "the launcher ended before it could write a reason",
            "possible causes are SIGKILL (also from the kernel for lack of memory: dmesg), a signal that it does not "
            "handle, and the end of its machine or allocation. Continue with launcher resume",
        ),
        _cause(
            FailureCode.OUT_OF_STEP,
            "a rank left the plan",
            "the run stopped before an update with another learning rate than planned: something else stepped the "
            "scheduler, or the ranks run different versions. Continue with launcher resume",
        ),
        _cause(
            FailureCode.HUNG,
            "a rank waits for something that never comes",
            "stacks.txt beside the logs shows where each rank was: look at the ranks that differ, at their node "
            "(dmesg, nvidia-smi) and at the network. Then continue with launcher resume. If the run was only slow, set "
            "train.hang_seconds to a larger number, or to 0 to switch the check off",
        ),
        _cause(
            FailureCode.LOSS_SPIKE,
            "the loss spiked",
            f"resume from the checkpoint with a lower learning rate: {_LOWER}",
        ),
        _cause(
            FailureCode.NAN_WEIGHTS,
            "the loaded weights hold NaN or Inf",
            "a lower learning rate does not help: download or copy the folder again and compare its checksums, or use "
            "an earlier checkpoint; weights that are finite on disk and Inf here overflow float16: set "
            "model.dtype=bfloat16",
        ),
        _cause(
            FailureCode.CHECKPOINT_DAMAGED,
            "a checkpoint is damaged",
            "remove or rename that checkpoint's folder: launcher resume then uses the previous one",
        ),
    )
)
"""Codes that identify the cause: they take precedence over any message."""

FALLBACK_BY_CODE = {
    FailureCode.DISK_FULL: cause_named("the disk is full"),
    FailureCode.PERMISSION: cause_named("permission was denied"),
    FailureCode.MISSING_FILE: cause_named("a file or folder is missing"),
    FailureCode.OUT_OF_MEMORY: cause_named(ALLOCATION_FAILED),
    FailureCode.PEER_LOST: cause_named("another rank ended during a collective"),
    FailureCode.NETWORK: Cause(
        "the nodes cannot reach each other",
        "a firewall or the wrong network is between the nodes: launcher doctor checks the connections between them",
        FailureCode.NETWORK,
    ),
}
"""Codes for which a message may be more specific: they count if no message matches."""


def cause_of(code: FailureCode, *texts: str | None) -> Cause | None:
    """The cause of a failure with this code and these messages; None if it is not known."""
    return CAUSE_BY_CODE.get(code) or find_cause(*texts) or FALLBACK_BY_CODE.get(code)
