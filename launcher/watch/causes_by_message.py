"""Known causes, recognised by the messages of other software, each with a one-line hint.

The patterns match messages of torch, NCCL, CUDA, Ray, Slurm, the kernel and Python, never the launcher's own: its
failures have codes (causes_by_code.py).
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from launcher.errors import FailureCode


@dataclass(frozen=True)
class Cause:
    """A cause: what it is, the hint, its code, and the hint for a run on a single node if that differs."""

    name: str
    hint: str
    code: FailureCode = FailureCode.UNKNOWN
    hint_single_node: str | None = None


@dataclass(frozen=True)
class TextCause(Cause):
    """A cause that a message shows."""

    pattern: re.Pattern[str] = re.compile("(?!)")


def _cause(
    name: str, hint: str, *patterns: str, code: FailureCode = FailureCode.UNKNOWN, hint_single_node: str | None = None
) -> TextCause:
    return TextCause(name, hint, code, hint_single_node, re.compile("|".join(patterns)))


KILLED_FOR_MEMORY = "out of memory on the node"
ALLOCATION_FAILED = "a memory allocation on the node failed"
SHARED_MEMORY_FULL = "the node's shared memory is full"

CAUSES = (
    _cause(
        "out of GPU memory",
        "set a smaller train.train_micro_batch_size_per_gpu (gradient accumulation keeps the batch size) or "
        "model.gradient_checkpointing: true, both also in launcher resume; in a new run also a higher ZeRO stage, "
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
        "request more memory per node (slurm.mem), start fewer ranks per node, offload less to CPU memory, or use a "
        "higher ZeRO stage; the node's kernel log (dmesg) names the killed process",
        r"\boom[-_]kill",
        r"OOM Killed",
        r"Out of memory: Kill",
        r"Exceeded (?:job|step) memory limit",
        r"memory pressure.*OutOfMemory|OutOfMemoryError: Task was killed due to the node running low on memory",
        code=FailureCode.OUT_OF_MEMORY,
    ),
    _cause(
        "a DataLoader worker was killed",
        "if the node's memory was nearly full, use fewer DataLoader workers or request more memory (slurm.mem); "
        "if not, find out what killed it",
        r"DataLoader worker .* is killed by signal: Killed",
        code=FailureCode.RANK_KILLED,
    ),
    _cause(
        ALLOCATION_FAILED,
        "the message shows the size of the allocation: request more memory per node (slurm.mem), start fewer ranks "
        "per node, offload less to CPU memory, or use a higher ZeRO stage",
        r"DefaultCPUAllocator: (?:can't|not enough) ",
        r"Cannot allocate memory",
        r"\bMemoryError\b",
        code=FailureCode.OUT_OF_MEMORY,
    ),
    _cause(
        SHARED_MEMORY_FULL,
        "give the container or node a larger /dev/shm (docker --shm-size=8g, an emptyDir of medium Memory)",
        r"unable to (?:allocate|write to|open|resize) (?:shared memory|file </torch_)",
        r"unable to open shared memory object",
        r"Error while creating shared memory segment",
        r"insufficient shared memory \(shm\)",
    ),
    _cause(
        "the disk is full",
        "free space in the file system of the run directory or set another output_dir, keep fewer checkpoints "
        "(checkpoint.keep), and check quotas and /tmp",
        r"No space left on device",
        r"Disk quota exceeded",
        r"enforce fail at inline_container\.cc.*unexpected pos",
        r"PytorchStreamWriter failed writing file",
        r"basic_ios::clear: iostream error",
        code=FailureCode.DISK_FULL,
    ),
    _cause(
        "a network address is in use",
        "another process took the port: start the run again, and look for a process that an earlier run left on the "
        "node",
        r"EADDRINUSE",
        r"[Aa]ddress already in use",
        code=FailureCode.NETWORK,
    ),
    _cause(
        "a collective timed out (NCCL)",
        "a rank did not join the collective that the others waited in: look for a rank that is slow, hangs or waits "
        "for storage (launcher status), and for a network problem (cluster.env: NCCL_DEBUG: INFO)",
        r"Watchdog caught collective operation timeout",
        r"Some NCCL operations have failed or timed out",
        r"wait timeout after \d+ms",
        code=FailureCode.TIMEOUT,
    ),
    _cause(
        "a collective timed out (gloo)",
        "a rank did not join the collective that the others waited in: look for a rank that is slow, hangs or waits "
        "for storage (launcher status)",
        r"Timed out waiting \d+ms for (?:recv|send) operation",
        r"Application timeout caused pair closure",
        code=FailureCode.TIMEOUT,
    ),
    _cause(
        "the GPU driver does not support this torch",
        "update the node's driver, or install a torch built for its CUDA version",
        r"NVIDIA driver on your system is too old",
        r"CUDA driver version is insufficient",
        r"Driver/library version mismatch",
        r"forward compatibility was attempted on non supported HW",
        r"driver shutting down|system not yet initialized",
    ),
    _cause(
        "a package was not compiled for this GPU architecture",
        "install a torch (and other compiled packages) built for this GPU architecture, or use other nodes",
        r"no kernel image is available for execution on the device",
        r"not compatible with the current PyTorch installation",
    ),
    _cause(
        "a GPU is broken",
        "exclude the node (slurm.exclude) and check its GPU: nvidia-smi -q, and Xid messages in dmesg",
        r"uncorrectable (?:NVLink|ECC) error",
        r"uncorrectable ECC error encountered",
        r"fallen off the bus",
        r"\bXid\b",
        r"CUDA error: unspecified launch failure",
        hint_single_node="check the GPU: nvidia-smi -q, and Xid messages in dmesg; a reset or a reboot may help",
    ),
    _cause(
        "a GPU kernel got an invalid index or address",
        "usually a token id beyond the vocabulary, or a bug: run on one GPU with CUDA_LAUNCH_BLOCKING=1 in "
        "cluster.env to see where",
        r"device-side assert triggered",
        r"an illegal memory access was encountered",
    ),
    _cause(
        "torch finds no GPU",
        "install a torch with CUDA on every node, or train on CPUs with cluster.gpus_per_node=0",
        r"Torch not compiled with CUDA enabled",
        r"doesn't have NCCL built in",
        r"No CUDA GPUs are available",
        r"no CUDA-capable device is detected",
        r"Found no NVIDIA driver",
    ),
    _cause(
        "the network interface does not exist",
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names an interface that this node does not have: remove it from "
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
        "an installed package is incompatible with the others",
        "a compiled package was built for another torch, CUDA or system library: reinstall it on the nodes",
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
        "install a compiler on the nodes (g++, ninja, and for GPUs a CUDA toolkit in CUDA_HOME that matches torch's "
        "CUDA version), or build the kernels in advance with DS_BUILD_OPS",
        r"CUDA_HOME does not exist",
        r"CUDAMismatchException",
        r"Ninja is required to load C\+\+ extensions",
        r"Error building extension",
        r"Error compiling objects for extension",
        r"fatal error: cuda_runtime",
    ),
    _cause(
        "a model or data set is not on this machine, and downloads are disabled",
        "download it once on a machine with internet access (the ranks are offline), or give its local folder",
        r"couldn't connect to 'https://huggingface\.co'",
        r"outgoing traffic has been disabled",
        r"OfflineModeIsEnabled",
        r"Cannot reach https://huggingface\.co",
    ),
    _cause(
        "the hub refuses the model or data set",
        "accept its conditions on its hub page, and log in with a token that has read access (HF_TOKEN)",
        r"GatedRepoError",
        r"[Cc]annot access gated repo",
        r"401 Client Error",
        r"RepositoryNotFoundError",
    ),
    _cause(
        "a file is damaged",
        "a download or copy was interrupted: download it again, or resume from the previous checkpoint",
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
        hint_single_node="check whether the path in the message exists on the node, and whether something removed it",
    ),
    _cause(
        "rank 0 cannot be reached",
        "a firewall or the wrong network is between the nodes, or rank 0 ended early: launcher doctor checks the "
        "connections between them",
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
        "unusual rows in the data around that update",
        r"Current loss scale already at minimum",
        code=FailureCode.NAN_LOSS,
    ),
    _cause(
        "weights do not match the model",
        "the checkpoint or folder belongs to another model or vocabulary: use the one that the run started with",
        r"Error\(s\) in loading state_dict",
        r"size mismatch for ",
        code=FailureCode.WEIGHTS_DIFFER,
    ),
    _cause(
        "Slurm ended the job at its time limit",
        "continue with launcher resume, and request more time (slurm.time) or save more often (checkpoint.every)",
        r"DUE TO TIME LIMIT",
    ),
    _cause(
        "Slurm preempted the job",
        "continue with launcher resume; with slurm.requeue Slurm queues the job again",
        r"DUE TO PREEMPTION",
    ),
    _cause(
        "a node failed",
        "continue with launcher resume on other nodes, and exclude that node (slurm.exclude)",
        r"DUE TO NODE FAILURE",
        r"NODE_FAIL",
        code=FailureCode.NODE_LOST,
        hint_single_node="its agent, a Ray process, ended: the kernel log (dmesg) shows whether the kernel killed it "
        "for lack of memory; if not, an operator or a limit ended it. Continue with launcher resume",
    ),
    _cause(
        "Ray's head process ended",
        "continue with launcher resume; the head node's kernel log (dmesg) and Ray's gcs_server log show why it ended, "
        "and whether the node was short of memory",
        r"Failed to connect to GCS within",
        r"GCS may have been killed",
        code=FailureCode.RAY_LOST,
    ),
    _cause(
        "another rank ended during a collective",
        "this rank only lost its peer: find the rank or node that ended first, in its log and its node's kernel log",
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
"""The first cause with a matching pattern counts: more specific patterns come first."""

_BY_SIGNAL = {
    -signal.SIGSEGV: Cause(
        "a crash in compiled code",
        "a compiled package is incompatible with the others or the hardware: PYTHONFAULTHANDLER=1 in cluster.env shows "
        "where it crashed",
        FailureCode.RANK_CRASHED,
    ),
    -signal.SIGILL: Cause(
        "compiled code uses instructions that this CPU does not have",
        "it was compiled on a newer node and run on an older one: set another TORCH_EXTENSIONS_DIR for each CPU type",
        FailureCode.RANK_CRASHED,
    ),
}


def cause_named(name: str) -> Cause:
    """The cause with this name."""
    return next(cause for cause in CAUSES if cause.name == name)


def find_cause(*texts: str | None) -> Cause | None:
    """The cause of the first text that matches a known one; None if none does."""
    for text in texts:
        found = next((cause for cause in CAUSES if text and cause.pattern.search(text)), None)
        if found is not None:
            return found
    return None


def cause_of_signal(exit_code: int | None) -> Cause | None:
    """The usual cause of an end by this signal (a negative exit status), other than SIGKILL; None if not known."""
    if exit_code == -signal.SIGBUS:
        return cause_named(SHARED_MEMORY_FULL)
    return None if exit_code is None else _BY_SIGNAL.get(exit_code)
