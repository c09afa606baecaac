"""The causes of the launcher's own failures, by their code."""

from __future__ import annotations

from launcher.errors import FailureCode
from launcher.watch.causes import MEMORY_REFUSED, Cause, find_cause, named

_LOWER = "launcher resume RUN schedule.peak_lr=…"


def _cause(code: FailureCode, name: str, hint: str, hint_alone: str | None = None) -> tuple[FailureCode, Cause]:
    return code, Cause(name, hint, code, hint_alone)


CERTAIN = dict(
    (
        (FailureCode.VERSIONS_DIFFER, named("versions differ")),
        (FailureCode.NODE_LOST, named("a node broke down")),
        (FailureCode.NAN_LOSS, named("the loss is NaN or Inf")),
        (FailureCode.WEIGHTS_DIFFER, named("weights do not fit the model")),
        _cause(
            FailureCode.PLAN_DAMAGED,
            "plan.json is not what the launcher wrote",
            "restore plan.json from a copy, or resume with the launcher version that wrote it; a changed job is given "
            "as overrides to launcher resume, never by editing the plan",
        ),
        _cause(
            FailureCode.PLAN_DIFFERS,
            "the ranks have different plans",
            "output_dir must be storage that all nodes share, and the launcher the same on every node",
        ),
        _cause(
            FailureCode.DATA_DIFFERS,
            "a node's data is not the data that was planned",
            "give every node the same data files and tokenizer, or put the data on storage that all nodes share",
        ),
        _cause(
            FailureCode.NODE_UNFIT,
            "a node does not have what the job asks for",
            "leave that node out (slurm.exclude), or have its GPUs and driver looked at (nvidia-smi)",
            "have its GPUs and driver looked at (nvidia-smi), or ask for fewer GPUs (cluster.gpus_per_node)",
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
            "ask for fewer nodes or ranks, wait longer (cluster.wait_seconds), or free some",
        ),
        _cause(
            FailureCode.RAY_LOST,
            "Ray was not reached, or its head process ended",
            "see that Ray's head process (gcs_server) runs and that cluster.address names it; its log and the head "
            "node's kernel log (dmesg) say why it ended. Then continue with launcher resume, or launcher run if "
            "nothing was saved",
        ),
        _cause(
            FailureCode.SUPERVISOR_LOST,
            "the launcher was ended by something that leaves it no time to write",
            "SIGKILL (also by the kernel for lack of memory: dmesg), a signal that it does not handle, or the end of "
            "its machine or allocation. Continue with launcher resume",
        ),
        _cause(
            FailureCode.OUT_OF_STEP,
            "a rank left the plan",
            "the run stopped before an update at another learning rate than the plan's: something else stepped the "
            "scheduler, or the ranks run different versions. Continue with launcher resume",
        ),
        _cause(
            FailureCode.LOSS_SPIKE,
            "the loss spiked",
            f"resume from the checkpoint with a lower learning rate: {_LOWER}",
        ),
        _cause(
            FailureCode.NAN_WEIGHTS,
            "the loaded weights hold NaN or Inf",
            "no learning rate helps: fetch or copy the folder again and compare its checksums, or take an earlier "
            "checkpoint; weights that are finite on disk and Inf here do not fit float16: model.dtype=bfloat16",
        ),
        _cause(
            FailureCode.CHECKPOINT_DAMAGED,
            "a checkpoint is damaged",
            "remove or rename that checkpoint's folder: launcher resume then takes the one before",
        ),
    )
)
"""Codes that leave no doubt: they count before any text."""

GENERAL = {
    FailureCode.DISK_FULL: named("the disk is full"),
    FailureCode.PERMISSION: named("permission was denied"),
    FailureCode.MISSING_FILE: named("a file or folder is missing"),
    FailureCode.OUT_OF_MEMORY: named(MEMORY_REFUSED),
    FailureCode.PEER_LOST: named("another rank went away in the middle of a collective"),
    FailureCode.NETWORK: Cause(
        "the nodes do not reach each other",
        "a firewall or the wrong network is between the nodes: launcher doctor checks the way between them",
        FailureCode.NETWORK,
    ),
}
"""Codes beside which a message may know more: they count if no text is known."""


def cause_of(code: FailureCode, *texts: str | None) -> Cause | None:
    """The cause of a failure with this code, of which these texts were said; None if none is known."""
    return CERTAIN.get(code) or find_cause(*texts) or GENERAL.get(code)
