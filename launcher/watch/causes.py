"""Well-known causes in the messages of other people's software, each with its hint in a line.

The patterns match what torch, NCCL, CUDA, Ray, Slurm, the kernel and Python say, never what the launcher says itself:
its own failures have codes (own_causes.py).
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from launcher.errors import FailureCode


@dataclass(frozen=True)
class Cause:
    """A cause: its kind, what it is, the hint, and the hint for a run on its only node where that is another."""

    name: str
    hint: str
    code: FailureCode = FailureCode.UNKNOWN
    hint_alone: str | None = None


@dataclass(frozen=True)
class TextCause(Cause):
    """A cause that is recognised by a message."""

    pattern: re.Pattern[str] = re.compile("(?!)")


def _cause(
    name: str, hint: str, *patterns: str, code: FailureCode = FailureCode.UNKNOWN, hint_alone: str | None = None
) -> TextCause:
    return TextCause(name, hint, code, hint_alone, re.compile("|".join(patterns)))


KILLED_FOR_MEMORY = "out of memory on the node"
MEMORY_REFUSED = "the node refused to give memory"
SHARED_MEMORY = "the shared memory of the node is full"

CAUSES = (
    _cause(
        "out of GPU memory",
        "take a smaller train.train_micro_batch_size_per_gpu (the batch stays, by accumulation) or set "
        "model.gradient_checkpointing: true, which launcher resume takes as well; in a new run a higher ZeRO stage, "
        "offload, or a shorter data.max_length",
        r"CUDA out of memory",
        r"CUDA error: out of memory",
        r"CUBLAS_STATUS_ALLOC_FAILED",
        r"HIP out of memory",
        r"Failed to CUDA calloc",
        code=FailureCode.OUT_OF_GPU_MEMORY,
    ),
    _cause(
        KILLED_FOR_MEMORY,
        "ask for more memory per node (slurm.mem), start fewer ranks per node, offload less to it, or take a higher "
        "ZeRO stage; the node's kernel log (dmesg) names the process that was killed",
        r"\boom[-_]kill",
        r"OOM Killed",
        r"Out of memory: Kill",
        r"Exceeded (?:job|step) memory limit",
        r"memory pressure.*OutOfMemory|OutOfMemoryError: Task was killed due to the node running low on memory",
        code=FailureCode.OUT_OF_MEMORY,
    ),
    _cause(
        "a worker of a DataLoader was killed",
        "if the node's memory was nearly full, give the DataLoader fewer workers or the node more memory (slurm.mem); "
        "if not, find out who ended it",
        r"DataLoader worker .* is killed by signal: Killed",
        code=FailureCode.RANK_KILLED,
    ),
    _cause(
        MEMORY_REFUSED,
        "see in the message how much was asked for: ask for more memory per node (slurm.mem), start fewer ranks per "
        "node, offload less to it, or take a higher ZeRO stage",
        r"DefaultCPUAllocator: (?:can't|not enough) ",
        r"Cannot allocate memory",
        r"\bMemoryError\b",
        code=FailureCode.OUT_OF_MEMORY,
    ),
    _cause(
        SHARED_MEMORY,
        "give the container or node a larger /dev/shm (docker --shm-size=8g, an emptyDir of medium Memory)",
        r"unable to (?:allocate|write to|open|resize) (?:shared memory|file </torch_)",
        r"unable to open shared memory object",
        r"Error while creating shared memory segment",
        r"insufficient shared memory \(shm\)",
    ),
    _cause(
        "the disk is full",
        "make room where the run directory lies or take another output_dir, keep fewer checkpoints (checkpoint.keep), "
        "and look at quotas and at /tmp",
        r"No space left on device",
        r"Disk quota exceeded",
        r"enforce fail at inline_container\.cc.*unexpected pos",
        r"PytorchStreamWriter failed writing file",
        r"basic_ios::clear: iostream error",
        code=FailureCode.DISK_FULL,
    ),
    _cause(
        "a network address is in use",
        "another process took the port in the meantime: start the run again, and look for a process of an earlier run "
        "that was left on the node",
        r"EADDRINUSE",
        r"[Aa]ddress already in use",
        code=FailureCode.NETWORK,
    ),
    _cause(
        "a collective timed out (NCCL)",
        "one rank did not come to the collective that the others waited in: look for a rank that is slow, hangs or "
        "waits for storage (launcher status), and for a network that is stuck (cluster.env: NCCL_DEBUG: INFO)",
        r"Watchdog caught collective operation timeout",
        r"Some NCCL operations have failed or timed out",
        r"wait timeout after \d+ms",
        code=FailureCode.TIMEOUT,
    ),
    _cause(
        "a collective timed out (gloo)",
        "one rank did not come to the collective that the others waited in: look for a rank that is slow, hangs or "
        "waits for storage (launcher status)",
        r"Timed out waiting \d+ms for (?:recv|send) operation",
        r"Application timeout caused pair closure",
        code=FailureCode.TIMEOUT,
    ),
    _cause(
        "the GPU driver does not fit this torch",
        "update the driver of the node, or install a torch that was built for its CUDA version",
        r"NVIDIA driver on your system is too old",
        r"CUDA driver version is insufficient",
        r"Driver/library version mismatch",
        r"forward compatibility was attempted on non supported HW",
        r"driver shutting down|system not yet initialized",
    ),
    _cause(
        "no code for this kind of GPU",
        "install a torch (and other compiled packages) built for this GPU's architecture, or take other nodes",
        r"no kernel image is available for execution on the device",
        r"not compatible with the current PyTorch installation",
    ),
    _cause(
        "a GPU is broken",
        "leave the node out (slurm.exclude) and have its GPU looked at: nvidia-smi -q, and Xid messages in dmesg",
        r"uncorrectable (?:NVLink|ECC) error",
        r"uncorrectable ECC error encountered",
        r"fallen off the bus",
        r"\bXid\b",
        r"CUDA error: unspecified launch failure",
        hint_alone="have the GPU looked at: nvidia-smi -q, and Xid messages in dmesg; a reset or a reboot may help",
    ),
    _cause(
        "a GPU kernel was given wrong indices or addresses",
        "mostly a token id beyond the vocabulary, or a bug: run once on one GPU with CUDA_LAUNCH_BLOCKING=1 in "
        "cluster.env to see where",
        r"device-side assert triggered",
        r"an illegal memory access was encountered",
    ),
    _cause(
        "this torch knows no GPU",
        "install a torch with CUDA on every node, or train on processors with cluster.gpus_per_node=0",
        r"Torch not compiled with CUDA enabled",
        r"doesn't have NCCL built in",
        r"No CUDA GPUs are available",
        r"no CUDA-capable device is detected",
        r"Found no NVIDIA driver",
    ),
    _cause(
        "the network interface is not there",
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names an interface that this node has not: leave it out of "
        "cluster.env and the environment, or name one that all nodes have",
        r"Unable to find address for: ",
        r"[Nn]o socket interface found",
        r"Bootstrap : no socket interface",
        r"Unable to find interface",
    ),
    _cause(
        "versions differ",
        "install the same versions of launcher, torch, deepspeed and transformers on every node",
        r"[Vv]ersion mismatch",
        r"Mismatched NCCL version",
        code=FailureCode.VERSIONS_DIFFER,
    ),
    _cause(
        "an installed package does not fit the others",
        "a compiled package was built for another torch, CUDA or system library: install it anew on the nodes",
        r"undefined symbol",
        r"version `(?:GLIBC|GLIBCXX|CXXABI)_[\d.]+' not found",
        r"ImportError: .*\.so(?:\.\d+)*: cannot open shared object file",
        r"DLL load failed",
    ),
    _cause(
        "a Python package is missing",
        "install it in the Python that the ranks run in, on every node",
        r"ModuleNotFoundError: No module named",
        r"ImportError: cannot import name",
        r"ImportError: .* requires the following packages|ImportError: .* not found in your environment",
    ),
    _cause(
        "DeepSpeed cannot compile its kernels",
        "install a compiler on the nodes (g++, ninja, and for GPUs a CUDA toolkit in CUDA_HOME that fits torch's "
        "CUDA), or build them before with DS_BUILD_OPS",
        r"CUDA_HOME does not exist",
        r"CUDAMismatchException",
        r"Ninja is required to load C\+\+ extensions",
        r"Error building extension",
        r"Error compiling objects for extension",
        r"fatal error: cuda_runtime",
    ),
    _cause(
        "a model or data set is not on this machine, and the internet was not asked",
        "fetch it once where there is internet (the ranks are offline), or give the folder that it lies in",
        r"couldn't connect to 'https://huggingface\.co'",
        r"outgoing traffic has been disabled",
        r"OfflineModeIsEnabled",
        r"Cannot reach https://huggingface\.co",
    ),
    _cause(
        "the hub refuses the model or data set",
        "accept its conditions on the hub's page, and log in with a token that may read it (HF_TOKEN)",
        r"GatedRepoError",
        r"[Cc]annot access gated repo",
        r"401 Client Error",
        r"RepositoryNotFoundError",
    ),
    _cause(
        "a file is damaged",
        "a download or copy broke off: fetch it again, or resume from the checkpoint before",
        r"Error while deserializing header",
        r"SafetensorError",
        r"PytorchStreamReader failed",
        r"invalid load key",
        r"unexpected EOF|Ran out of input",
    ),
    _cause(
        "permission was denied",
        "the user of the ranks must be able to read the model and the data, and to write to output_dir and the caches, "
        "on every node",
        r"Permission denied",
        r"PermissionError",
        r"Read-only file system",
        code=FailureCode.PERMISSION,
    ),
    _cause(
        "a file or folder is missing",
        "it must be on storage that all nodes see, under the same path on each of them",
        r"FileNotFoundError",
        r"No such file or directory",
        r"NotADirectoryError",
        r"Stale file handle",
        code=FailureCode.MISSING_FILE,
        hint_alone="look whether the path in the message exists on the node, and whether something removed it",
    ),
    _cause(
        "the first rank was not reached",
        "a firewall or the wrong network lies between the nodes, or the first rank ended early: launcher doctor checks "
        "the way between them",
        r"client socket has timed out",
        r"client socket has failed to connect",
        r"No route to host",
        r"Name or service not known",
        r"Connection refused",
        r"Network is unreachable",
        r"Gloo connectFullMesh failed",
        code=FailureCode.NETWORK,
    ),
    _cause(
        "the loss is NaN or Inf",
        "resume from the checkpoint with a lower learning rate (launcher resume RUN schedule.peak_lr=…), and look for "
        "odd rows in the data around that update",
        r"Current loss scale already at minimum",
        code=FailureCode.NAN_LOSS,
    ),
    _cause(
        "weights do not fit the model",
        "the checkpoint or folder belongs to another model or vocabulary: take the one that the run began with",
        r"Error\(s\) in loading state_dict",
        r"size mismatch for ",
        code=FailureCode.WEIGHTS_DIFFER,
    ),
    _cause(
        "Slurm ended the job at its time limit",
        "continue with launcher resume, and ask for more time (slurm.time) or save more often (checkpoint.every)",
        r"DUE TO TIME LIMIT",
    ),
    _cause(
        "Slurm gave the nodes to another job",
        "continue with launcher resume; with slurm.requeue the job queues itself again",
        r"DUE TO PREEMPTION",
    ),
    _cause(
        "a node broke down",
        "continue with launcher resume on other nodes, and leave that node out (slurm.exclude)",
        r"DUE TO NODE FAILURE",
        r"NODE_FAIL",
        code=FailureCode.NODE_LOST,
        hint_alone="its agent, a process of Ray, ended: the kernel log (dmesg) shows whether it was killed for lack of "
        "memory; if not, an operator or a limit ended it. Continue with launcher resume",
    ),
    _cause(
        "Ray's head process ended",
        "continue with launcher resume; look in the head node's kernel log (dmesg) and Ray's gcs_server log for why it "
        "ended, and whether the node was short of memory",
        r"Failed to connect to GCS within",
        r"GCS may have been killed",
        code=FailureCode.RAY_LOST,
    ),
    _cause(
        "another rank went away in the middle of a collective",
        "this rank only noticed it: look for the rank or node that ended first, in its log and its node's kernel log",
        r"Connection (?:closed|reset) by (?:remote )?peer",
        r"remote process exited or there was a network error",
        r"ncclRemoteError",
        r"(?:gloo|c10d|TCPStore|ProcessGroup|NCCL)[^\n]*(?:Broken pipe|Socket closed)",
        r"failed to recv, got 0 bytes",
        code=FailureCode.PEER_LOST,
    ),
    _cause(
        "NCCL failed in the network or the driver",
        "set NCCL_DEBUG: INFO in cluster.env and run again: the line before the error names the interface or device",
        r"ncclSystemError",
        r"ncclInternalError",
        r"unhandled (?:system|cuda) error",
        r"NCCL error",
    ),
)
"""The first whose pattern is found counts: what is more telling comes first."""

_BY_SIGNAL = {
    -signal.SIGSEGV: Cause(
        "a crash in compiled code",
        "a compiled package does not fit the others or the hardware: PYTHONFAULTHANDLER=1 in cluster.env shows where",
        FailureCode.RANK_CRASHED,
    ),
    -signal.SIGILL: Cause(
        "compiled code that this processor does not know",
        "what was compiled on a newer node was run on an older one: give each kind its TORCH_EXTENSIONS_DIR",
        FailureCode.RANK_CRASHED,
    ),
}


def named(name: str) -> Cause:
    """The cause with this name."""
    return next(cause for cause in CAUSES if cause.name == name)


def find_cause(*texts: str | None) -> Cause | None:
    """The cause that the first telling text shows; None if none does."""
    for text in texts:
        found = next((cause for cause in CAUSES if text and cause.pattern.search(text)), None)
        if found is not None:
            return found
    return None


def cause_of_signal(exit_code: int | None) -> Cause | None:
    """What is mostly behind an end by this signal, other than SIGKILL; a negative exit status names the signal."""
    if exit_code == -signal.SIGBUS:
        return named(SHARED_MEMORY)
    return None if exit_code is None else _BY_SIGNAL.get(exit_code)
