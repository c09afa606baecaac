"""`launcher why`: the first failure, the failures that followed from it, and the cause."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode
from launcher.first_failure import Place, describe_places, last_traceback
from launcher.run_dir import write_json
from launcher.runs.excluded_nodes import exclude_node
from launcher.watch import runs_without_codes
from launcher.watch.causes_by_code import CAUSE_BY_CODE, FALLBACK_BY_CODE, cause_of
from launcher.watch.causes_by_message import CAUSES, find_cause
from launcher.watch.failures import normalised
from launcher.watch.why import Explanation, explain, failed_message, why_view
from tests.unit.inputs import command
from tests.unit.run_directories import GIB, START, Built, rank, stamp

TEXTS = {
    "out of GPU memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 "
        "GiB of which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in use.",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    "out of memory on the node": (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=11300781.0. Some of the step tasks have been OOM "
        "Killed.",
        "slurmstepd: error: Exceeded job memory limit",
    ),
    "a DataLoader worker was killed": ("RuntimeError: DataLoader worker (pid 1234) is killed by signal: Killed.",),
    "a memory allocation on the node failed": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)",
        "MemoryError",
    ),
    "the node's shared memory is full": (
        "RuntimeError: unable to write to file </torch_1234_5678_0>: No space left on device (28)",
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
        "Error while creating shared memory segment /dev/shm/nccl-hXq3yb (size 9637888)",
    ),
    "the disk is full": (
        "OSError: [Errno 28] No space left on device",
        "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        "OSError: [Errno 122] Disk quota exceeded: '/home/u/.cache/torch'",
    ),
    "a network address is in use": (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: "
        "23456, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    "a collective timed out (NCCL)": (
        "[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, "
        "Timeout(ms)=600000) ran "
        "for 600060 milliseconds before timing out.",
    ),
    "a collective timed out (gloo)": (
        "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out "
        "waiting "
        "4000ms for recv operation to complete",
    ),
    "the GPU driver does not support this torch": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
        "driver",
        "Failed to initialize NVML: Driver/library version mismatch",
    ),
    "a package was not compiled for this GPU architecture": (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    ),
    "a GPU is broken": ("RuntimeError: CUDA error: uncorrectable ECC error encountered",),
    "a GPU kernel got an invalid index or address": (
        "RuntimeError: CUDA error: device-side assert triggered",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    ),
    "torch finds no GPU": (
        "AssertionError: Torch not compiled with CUDA enabled",
        "RuntimeError: Distributed package doesn't have NCCL built in",
        "RuntimeError: No CUDA GPUs are available",
    ),
    "the network interface does not exist": (
        "RuntimeError: [enforce fail at /__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != "
        "nullptr. Unable to find address for: eth9",
        "NCCL WARN Bootstrap : no socket interface found",
    ),
    "versions differ": ("RuntimeError: Mismatched NCCL version detected : NCCL 2.21.5 versus NCCL 2.25.1",),
    "an installed package is incompatible with the others": (
        "ImportError: /opt/venv/lib/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
        "_ZN3c105ErrorC2ENS_14SourceLocationESs",
        "ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by x.so)",
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
    ),
    "a Python package is missing": ("ModuleNotFoundError: No module named 'flash_attn'",),
    "DeepSpeed cannot compile its kernels": (
        "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)",
        "RuntimeError: Ninja is required to load C++ extensions (pip install ninja to get it)",
        "RuntimeError: Error building extension 'cpu_adam'",
    ),
    "a model or data set is not on this machine, and downloads are disabled": (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
        "cached files.",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and "
        "outgoing "
        "traffic has been disabled. To enable hf.co look-ups and downloads online, set 'local_files_only' to False.",
    ),
    "the hub refuses the model or data set": (
        "huggingface_hub.errors.GatedRepoError: 403 Client Error. Cannot access gated repo for url https://hf.co/a/b",
    ),
    "a file is damaged": (
        "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: header too large",
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    ),
    "permission was denied": (
        "PermissionError: [Errno 13] Permission denied: '/data/train.jsonl'",
        "OSError: [Errno 30] Read-only file system: '/runs/a'",
    ),
    "a file or folder is missing": ("FileNotFoundError: [Errno 2] No such file or directory: '/nope/x.jsonl'",),
    "rank 0 cannot be reached": (
        "torch.distributed.DistNetworkError: The client socket has timed out after 2000ms while trying to connect to "
        "(127.0.0.1, 23457).",
    ),
    "the loss is NaN or Inf": (
        "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
    ),
    "weights do not match the model": (
        "RuntimeError: Error(s) in loading state_dict for Linear:\n\tsize mismatch for weight: copying a param with "
        "shape torch.Size([3, 3]) from checkpoint, the shape in current model is torch.Size([2, 2]).",
    ),
    "Slurm ended the job at its time limit": (
        "slurmstepd: error: *** JOB 3495064 ON gpu-01 CANCELLED AT 2021-10-27T19:35:36 DUE TO TIME LIMIT ***",
    ),
    "Slurm preempted the job": (
        "slurmstepd: error: *** JOB 77 ON gpu-01 CANCELLED AT 2026-03-01T12:00:00 DUE TO PREEMPTION ***",
    ),
    "a node failed": (
        "slurmstepd: error: *** STEP 77.0 ON gpu-01 CANCELLED AT 2026-03-01T12:00:00 DUE TO NODE FAILURE, SEE "
        "SLURMCTLD "
        "LOG FOR DETAILS ***",
    ),
    "Ray's head process ended": (
        "core_worker_process.cc:825: Failed to connect to GCS within 60 seconds. GCS may have been killed. It's either "
        "GCS is terminated by `ray stop` or is killed unexpectedly.",
    ),
    "another rank ended during a collective": (
        "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
        "[127.0.0.1]:63681: Connection reset by peer. This is typically caused by a remote worker hanging or bugs",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
        "remote process exited or there was a network error, NCCL version 2.21.5\nncclRemoteError: A call failed "
        "possibly due to a network error or a remote process exiting prematurely.",
    ),
    "NCCL failed in the network or the driver": (
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2501, unhandled system error "
        "(run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.25.1\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error.",
    ),
}
"""Real messages of torch, gloo, NCCL, Slurm, Ray, DeepSpeed and Hugging Face, by cause."""

OLD = (
    (FailureCode.VERSIONS_DIFFER, "OutOfStep: the plan was made with DeepSpeed 0.19.8: rank 2 on h1 has 0.19.7"),
    (FailureCode.VERSIONS_DIFFER, "node 1 (h1): torch 2.1, and 2.2 where the run was planned: install the same there"),
    (FailureCode.NOT_SHARED, "node 1 (h1) does not see /models/llama: it must lie on storage that all nodes share"),
    (FailureCode.NAN_LOSS, "the loss of update 17 is nan; the weights are those before it"),
    (FailureCode.NAN_LOSS, "DeepSpeed skipped update 17, whose gradient is no number"),
    (FailureCode.LOSS_SPIKE, "a spike, as schedule.on_spike asks. the loss rose by 5.1 over its median"),
    (FailureCode.NODE_LOST, "the node's agent is gone: The actor died unexpectedly before finishing this task."),
    (FailureCode.NOT_ENOUGH_NODES, "after 2 s there are not enough free nodes: asked for 2 nodes with 2 CPU each"),
    (FailureCode.UNKNOWN, "ValueError: this is new"),
)
"""Messages that the launcher wrote into run directories before failures had codes."""


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_a_known_message_has_a_cause(name: str, text: str) -> None:
    found = find_cause(f"some line before\n{text}\n  and one after")
    assert found is not None and found.name == name


def test_every_cause_has_a_message() -> None:
    assert set(TEXTS) == {cause.name for cause in CAUSES}
    assert find_cause("ValueError: this is new", None, "") is None


@pytest.mark.parametrize(("code", "text"), OLD)
def test_a_message_from_before_codes_has_a_code(code: FailureCode, text: str) -> None:
    assert runs_without_codes.code_of(None, f"before\n{text}\nafter") == code


@pytest.mark.parametrize(
    ("how", "exit_code"),
    [
        ("exit code 113", 113),
        ("signal SIGKILL", -9),
        ("signal 99", -99),
        ("signal SIGODD", None),
        ("an exception", None),
    ],
)
def test_an_exit_code_is_read_from_its_description(how: str, exit_code: int | None) -> None:
    assert runs_without_codes.exit_code_of(how) == exit_code


def test_the_launcher_s_own_failures_are_recognised_by_code() -> None:
    for code in CAUSE_BY_CODE:
        found = cause_of(code, "an unknown message, CUDA out of memory")
        assert found is CAUSE_BY_CODE[code] and found.code == code
    # A known message is more specific than an errno; without one the cause is that of the errno.
    shared = cause_of(FailureCode.DISK_FULL, "unable to write to file </torch_1_2>: No space left on device (28)")
    assert shared is not None and shared.name == "the node's shared memory is full"
    assert all((found := cause_of(code)) is not None and found.code == code for code in FALLBACK_BY_CODE)
    assert cause_of(FailureCode.UNKNOWN) is None


GLOO = "RuntimeError: [pair.cc:537] Read error [10.0.0.1]:63681: Connection reset by peer."


def traceback(rank_number: int, error: str, line: int = 12) -> str:
    return (
        "Traceback (most recent call last):\n"
        f'  File "/opt/venv/lib/python3.11/train.py", line {line}, in work\n'
        f"    step(rank={rank_number}, at=0x7f{rank_number:010x})\n"
        f"{error}\n"
    )


def failed(number: int, node: int, error: str | None, how: str = "exit code 1", **changes: Any) -> dict[str, Any]:
    reported = None if error is None else traceback(number, error)
    return {
        "rank": number,
        "node_rank": node,
        "host": f"h{node}",
        "how": how,
        "error": error,
        "traceback": reported,
        **changes,
    }


@pytest.fixture
def built(tmp_path: Path) -> Built:
    built = Built(tmp_path / "runs")
    built.nodes(["h0", "h1"])
    built.state("training", 5.0)
    for number in range(4):
        built.log(
            number // 2, f"h{number // 2}", f"rank-{number}", *((i, f"rank {number} line {i}") for i in range(30))
        )
    return built


def why(built: Built, *failures: dict[str, Any], reason: str = "failed") -> tuple[Explanation, str]:
    """The explanation of a run with these failures, and its text."""
    if failures:
        built.failure(40.0, *failures)
    built.state("failed", 41.0, reason=reason)
    found = explain(built.run)
    text = command("why", str(built.run.path))
    assert (text.status, text.err) == (0, "")
    assert text.out == why_view(found).plain + "\n"
    return found, text.out


def test_the_first_failed_rank_is_shown_with_its_host_and_log(built: Built) -> None:
    found, text = why(built, failed(3, 1, "ValueError: odd rows"), failed(0, 0, GLOO), failed(1, 0, GLOO))
    head, *rest = text.splitlines()
    assert head == "rank 3 on node 1 (h1) failed first, with exit code 1: ValueError: odd rows"
    log = built.run.node_logs(1, "h1") / "rank-3.log"
    assert rest[0] == f"  the end of {log}:"
    assert rest[1:21] == [f"    {stamp(i)} rank 3 line {i}" for i in range(10, 30)]
    assert rest[21] == "  2 other ranks failed because a peer was lost: ranks 0-1 on node 0 (h0)"
    assert found.cause is None


def test_identical_tracebacks_are_counted_and_not_repeated(built: Built) -> None:
    missing = "FileNotFoundError: [Errno 2] No such file or directory: '/local/rank{}/data'"
    found, text = why(built, *(failed(number, number // 2, missing.format(number)) for number in (2, 0, 1, 3)))
    assert "3 other ranks failed with the same traceback: ranks 0-1 on node 0 (h0), rank 3 on node 1 (h1)" in text
    assert text.count("FileNotFoundError") == 1
    assert found.cause is not None and found.cause.name == "a file or folder is missing"
    assert "2 of 2 nodes reported it before the run ended" in text
    assert "hint:         it must be on storage that all nodes see" in text


def test_a_file_that_is_missing_on_one_node(built: Built) -> None:
    missing = "FileNotFoundError: [Errno 2] No such file or directory: '/local/data'"
    _, text = why(built, failed(2, 1, missing), failed(3, 1, missing), failed(0, 0, GLOO))
    assert "1 of 2 nodes reported it before the run ended: ranks 2-3 on node 1 (h1)" in text


def test_other_failures_are_listed(built: Built) -> None:
    _, text = why(
        built,
        failed(0, 0, "ValueError: one thing"),
        failed(1, 0, "KeyError: 'another'"),
        failed(2, 1, None, how="signal SIGTERM"),
        failed(3, 1, None, how="exit code 113"),
    )
    assert "rank 1 on node 0 (h0) also failed, with KeyError: 'another'" in text
    assert "2 other ranks ended because the run ended: ranks 2-3 on node 1 (h1)" in text


def test_another_line_in_the_same_file_is_another_failure(built: Built) -> None:
    other = failed(1, 0, "ValueError: a") | {"traceback": traceback(1, "ValueError: a", line=99)}
    _, text = why(built, failed(0, 0, "ValueError: a"), other)
    assert "same traceback" not in text
    assert "rank 1 on node 0 (h0) also failed, with ValueError: a" in text


def test_a_rank_that_lost_its_peer_is_not_the_first_failure(built: Built) -> None:
    """The exit of a killed rank may be recorded a moment after its peers' errors."""
    found, text = why(built, failed(0, 0, GLOO), failed(1, 0, GLOO), failed(3, 1, None, how="signal SIGKILL"))
    assert text.startswith("rank 3 on node 1 (h1) failed first, with signal SIGKILL\n")
    assert "2 other ranks failed because a peer was lost: ranks 0-1 on node 0 (h0)" in text
    assert found.cause is not None and found.cause.name.startswith("killed by SIGKILL: from the kernel for lack of")
    assert found.code == "rank_killed"


def test_a_kill_after_the_grace_time_is_not_the_first_failure(built: Built) -> None:
    late = failed(1, 0, None, how="signal SIGKILL", time=START + 46.0)
    found, text = why(built, failed(0, 0, GLOO), late)
    assert text.startswith("rank 0 on node 0 (h0) failed first, with exit code 1: RuntimeError: [pair.cc:537]")
    assert found.cause is not None
    assert found.cause.name == "another rank ended during a collective"


def test_a_kill_with_full_memory_is_for_lack_of_memory(built: Built) -> None:
    built.node_json(1, "h1", 38.0, [rank(3)], memory_used_bytes=63 * GIB)
    found, text = why(built, failed(3, 1, None, how="signal SIGKILL"))
    used = "h1 used at most 98% of its memory in the half minute before its last report: it was nearly full"
    assert used in text
    assert found.cause is not None and "slurm.mem" in found.cause.hint
    assert found.cause.name == "killed by SIGKILL with 98% of memory used: most likely for lack of memory"
    assert found.code == "out_of_memory"


def test_a_kill_counted_by_the_kernel_is_for_lack_of_memory(built: Built) -> None:
    built.node_json(1, "h1", 45.0, [rank(3)], memory_used_bytes=20 * GIB, oom_kills=1)
    found, text = why(built, failed(3, 1, None, how="signal SIGKILL"))
    assert "the kernel of h1 killed 1 of its processes for lack of memory (oom_kill)" in text
    assert found.cause is not None and found.cause.name == "out of memory on the node"
    assert found.code == "out_of_memory" and "used at most" not in text


def test_a_kill_that_was_reported_as_one_for_lack_of_memory_has_the_same_cause(built: Built) -> None:
    built.node_json(1, "h1", 45.0, [rank(3)], memory_used_bytes=20 * GIB, oom_kills=1)
    how = "signal SIGKILL, from the kernel for lack of memory"
    found, text = why(built, failed(3, 1, None, how=how, exit_code=-9, code="out_of_memory"))
    assert text.startswith(f"rank 3 on node 1 (h1) failed first, with {how}\n")
    assert found.cause is not None and found.cause.name == "out of memory on the node"
    assert found.code == "out_of_memory"


@pytest.mark.parametrize("counted", [{}, {"oom_kills": 0}], ids=["not counted", "none counted"])
def test_a_kill_with_free_memory_is_not_for_lack_of_memory(built: Built, counted: dict[str, int]) -> None:
    """The memory in use before the kill counts: after it, the rank's memory is free anyway."""
    used = {"memory_used_bytes": GIB, "memory_peak_bytes": 8 * GIB, "memory_bytes": 64 * GIB}
    built.node_json(1, "h1", 45.0, [rank(3)], ended=True, **used, **counted)
    found, text = why(built, failed(3, 1, None, how="signal SIGKILL"))
    assert found.cause is not None and found.code == "rank_killed"
    assert found.cause.name == (
        "killed by SIGKILL with 12% of memory used: most likely not for lack of memory but by an operator, a scheduler "
        "or a limit"
    )
    assert "h1 used at most 12% of its memory in the half minute before its last report" in text
    assert "out of memory" not in text and "slurm.mem" not in text
    assert ("the kernel killed no process for lack of memory" in text) == bool(counted)


def test_a_failed_allocation_with_free_memory(built: Built) -> None:
    built.node_json(1, "h1", 45.0, [rank(3)], memory_used_bytes=8 * GIB, oom_kills=0)
    refused = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    found, text = why(built, failed(3, 1, refused))
    assert found.cause is not None and found.cause.name == "a memory allocation on the node failed"
    assert "at most 12% of its memory in the half minute before its last report: the allocation was too large" in text


def test_a_kill_reported_by_slurm_is_for_lack_of_memory_despite_free_memory(built: Built) -> None:
    built.node_json(1, "h1", 45.0, [rank(3)], memory_used_bytes=8 * GIB)
    built.log(1, "h1", "node", (39.0, TEXTS["out of memory on the node"][0]))
    found, text = why(built, failed(3, 1, None, how="signal SIGKILL"))
    assert found.cause is not None and found.cause.name == "out of memory on the node"
    assert "used at most" not in text


def test_a_script_s_exception_is_read_from_its_log(built: Built) -> None:
    for number in (2, 3):
        lines = traceback(number, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.").splitlines()
        built.log(1, "h1", f"rank-{number}", *((39.0, line) for line in lines), (39.5, "wandb: done"))
    found, text = why(built, *(failed(number, 1, None) for number in (2, 3)))
    assert text.startswith("rank 2 on node 1 (h1) failed first, with exit code 1: torch.OutOfMemoryError: CUDA out of")
    assert "1 other rank failed with the same traceback: rank 3 on node 1 (h1)" in text
    assert found.cause is not None and found.cause.name == "out of GPU memory"


def aborted(built: Built, *numbers: int, node_json: bool = True) -> list[dict[str, Any]]:
    """Ranks aborted by their NCCL watchdog in C++: only their logs contain the error. Four ranks per node."""
    (watchdog,) = TEXTS["a collective timed out (NCCL)"]
    stacks = [(39.5, f"frame #{number}: clone3 + 0x2c (0x7f{number:06x} in libc.so.6)") for number in range(150)]
    for number in numbers:
        error = [(39.0, watchdog.replace("Rank 0", f"Rank {number}")), (39.1, "terminate called after throwing")]
        built.log(number // 4, f"h{number // 4}", f"rank-{number}", *error, *stacks)
    if node_json:
        for node in range(2):
            built.node_json(node, f"h{node}", 38.0, [rank(4 * node + local) for local in range(4)])
    return [failed(number, number // 4, None, how="signal SIGABRT") for number in numbers]


def test_ranks_missing_from_a_collective_that_timed_out_are_named(built: Built) -> None:
    others = aborted(built, 0, 1, 2, 3, 4, 6, 7)
    found, text = why(built, *others)
    assert text.startswith("a collective timed out; these ranks did not join it: rank 5 on node 1 (h1)\n")
    assert "7 ranks timed out in it: ranks 0-3 on node 0 (h0), ranks 4, 6-7 on node 1 (h1)\n" in text
    assert "failed first" not in text and "same error" not in text
    assert found.cause is not None and found.cause.name == "a collective timed out (NCCL)"
    assert found.failures is not None and len(found.failures.followers) == 6


def test_a_timeout_on_every_rank_or_with_unknown_ranks_is_reported(built: Built) -> None:
    failures = aborted(built, 0, node_json=False)
    assert why(built, *failures)[1].startswith("a collective timed out; it is not known which ranks did not join it\n")
    _, text = why(built, *aborted(built, *range(8)))
    assert text.startswith("a collective timed out on every rank: they were in different collectives, or the network")


def test_timeouts_after_a_failure_are_followers(built: Built) -> None:
    failures = aborted(built, 0, 1)
    _, text = why(built, failed(5, 1, "ValueError: odd rows"), *failures)
    assert text.startswith("rank 5 on node 1 (h1) failed first, with exit code 1: ValueError: odd rows\n")
    assert "2 other ranks failed because a peer was lost: ranks 0-1 on node 0 (h0)" in text
    # A killed rank did not fail because of a lost peer, whatever its log contains.
    _, text = why(built, *failures[:1], failures[1] | {"how": "signal SIGKILL"})
    assert text.startswith("rank 1 on node 0 (h0) failed first, with signal SIGKILL\n")


def test_a_broken_pipe_is_a_lost_peer_only_in_a_collective() -> None:
    assert find_cause("BrokenPipeError: [Errno 32] Broken pipe") is None
    for text in ("[gloo/transport/tcp/pair.cc:537] write: Broken pipe", "ProcessGroupNCCL: Socket closed"):
        found = find_cause(text)
        assert found is not None and found.name == "another rank ended during a collective"


def test_an_abort_is_explained_by_the_end_of_the_log(built: Built) -> None:
    (watchdog,) = TEXTS["a collective timed out (NCCL)"]
    built.log(0, "h0", "rank-0", (39.0, watchdog))
    found, _ = why(built, failed(0, 0, None, how="signal SIGABRT"))
    assert found.cause is not None and found.cause.name == "a collective timed out (NCCL)"


def test_a_warning_in_the_log_is_not_the_cause_of_a_reported_error(built: Built) -> None:
    built.log(0, "h0", "rank-0", (39.0, "triton: cache: Permission denied, going on without it"))
    found, _ = why(built, failed(0, 0, "ValueError: odd rows"))
    assert found.cause is None


def test_a_lost_node(built: Built) -> None:
    built.log(1, "h1", "agent", (1.0, "rank 2 started"))
    lost = {"rank": None, "node_rank": 1, "host": "h1", "how": "the node's agent is gone: it died"}
    found, text = why(built, lost)
    assert text.startswith("node 1 (h1) is lost: the node's agent is gone: it died\n")
    assert "rank 2 started" in text
    assert found.cause is not None and found.cause.name == "a node failed"
    assert found.code == "node_lost" and "slurm.exclude" in text


@pytest.mark.parametrize(("job", "leave_out"), [({}, False), ({"slurm_job_id": "77"}, True)])
def test_a_single_node_is_excluded_only_if_slurm_has_others(
    tmp_path: Path, job: dict[str, str], leave_out: bool
) -> None:
    built = Built(tmp_path / "runs")
    built.nodes(["h0"])
    built.state("training", 5.0)
    built.failure(40.0, {"rank": None, "node_rank": 0, "host": "h0", "how": "it is gone", "code": "node_lost"})
    built.state("failed", 41.0, code="node_lost", **job)
    text = command("why", str(built.run.path)).out
    assert "node 0 (h0) is lost: it is gone\n" in text and "launcher resume" in text
    assert ("exclude that node" in text) == ("on other nodes" in text) == leave_out


def test_codes_take_precedence_over_messages(built: Built) -> None:
    event = failed(1, 0, "OutOfStep: another message", exit_code=1, code="out_of_step")
    found, text = why(built, event, failed(0, 0, GLOO, exit_code=1, code="peer_lost"))
    assert text.startswith("rank 1 on node 0 (h0) failed first, with exit code 1: OutOfStep: another message\n")
    assert found.code == "out_of_step" and found.cause is CAUSE_BY_CODE[FailureCode.OUT_OF_STEP]
    later = failed(1, 0, "NewError: from a later launcher", exit_code=1, code="a_future_code")
    found, _ = why(built, later)
    assert (found.code, found.cause) == ("unknown", None)
    # A rank that its agent ended did not fail first, whatever `how` is.
    ended = failed(3, 1, None, how="on request", exit_code=-15, code="ended")
    _, text = why(built, ended, failed(0, 0, None, how="an unknown exit", exit_code=3, code="unknown"))
    assert text.startswith("rank 0 on node 0 (h0) failed first, with an unknown exit\n")
    assert "1 other rank ended because the run ended: rank 3 on node 1 (h1)" in text


def test_an_event_without_a_list_has_one_failure(built: Built) -> None:
    built.event(40.0, "failure", rank=1, node_rank=0, host="h0", how="signal SIGSEGV", error=None)
    found, text = why(built)
    assert text.startswith("rank 1 on node 0 (h0) failed first, with signal SIGSEGV\n")
    assert found.cause is not None and found.cause.name == "a crash in compiled code"


def test_without_logs_the_reported_traceback_is_shown(built: Built) -> None:
    shutil.rmtree(built.run.logs)
    _, text = why(built, failed(3, 1, "ValueError: odd rows"))
    assert "rank-3.log (missing; as reported):" in text
    assert 'train.py", line 12, in work' in text


def test_a_failure_before_ranks_start(tmp_path: Path) -> None:
    preparing = Built(tmp_path / "runs", "b")
    preparing.state("preparing", 1.0)
    (preparing.run.logs / "prepare.log").write_text("Traceback …\nOSError: [Errno 28] No space left on device\n")
    found, text = why(preparing, reason="the process that prepares the data failed")
    assert text.startswith("the run failed while preparing: the process that prepares the data failed\n")
    assert "No space left on device" in text
    assert found.cause is not None and found.cause.name == "the disk is full"
    placing = Built(tmp_path / "runs", "c")
    placing.state("placing", 1.0)
    found, text = why(placing, reason="after 2 s there are not enough free nodes: asked for 2")
    assert text.startswith("the run failed while placing: after 2 s there are not enough free nodes")
    assert found.cause is not None and found.cause.name == "there are not enough nodes"
    coded = Built(tmp_path / "runs", "d")
    coded.state("placing", 1.0)
    coded.state("failed", 2.0, message="no node joined", code="not_enough_nodes")
    found = explain(coded.run)
    assert (found.headline, found.code) == ("the run failed while placing: no node joined", "not_enough_nodes")
    assert found.cause is not None and found.cause.name == "there are not enough nodes"


def test_a_failure_of_an_earlier_session_is_ignored(built: Built) -> None:
    built.failure(40.0, failed(3, 1, "ValueError: the first time"))
    built.state("failed", 41.0)
    built.event(90.0, "resume", update=5)
    built.nodes(["h0"], at=91.0)
    found, text = why(built, reason="a node does not answer")
    assert found.failures is None
    assert "the first time" not in text


def test_the_job_that_continues_a_run_or_why_there_is_none(built: Built) -> None:
    built.metrics(range(20))
    built.state("stopped", 60.0, slurm_job_id="78", reason="the time limit of its Slurm job is near")
    built.event(61.0, "not_continued", reason="job 78 was the last of 2 in a row (slurm.max_jobs)")
    shown = command("why", str(built.run.path)).out
    assert "no other Slurm job continues it: job 78 was the last of 2 in a row (slurm.max_jobs)" in shown
    # The record of an earlier job.
    write_json(built.run.continuation_file, {"job": "78", "continues": "77", "number": 2, "update": 5})
    assert json.loads(command("status", str(built.run.path), "--json").out)["continued_by"] is None
    built.state("stopped", 62.0, slurm_job_id="77")
    assert "Slurm job 78 was submitted to continue it" in command("why", str(built.run.path)).out
    assert "continued by Slurm job 78" in command("status", str(built.run.path)).out
    # That job runs.
    built.nodes(["h0"], at=70.0)
    built.state("stopped", 90.0, slurm_job_id="78")
    assert "continue it" not in command("why", str(built.run.path)).out


@pytest.mark.parametrize(
    ("state", "details", "words", "well"),
    [
        ("finished", {}, "no failure: the run finished after 20 updates", True),
        ("finished", {"reason": "early stopping: why"}, "finished after 20 updates: early stopping: why", True),
        ("stopped", {"reason": None}, "no failure: the run was stopped after 20 updates", True),
        ("stopped", {"reason": "cancelled by u@h"}, "the run was stopped after 20 updates: cancelled by u@h", True),
        (
            "stopped",
            {"reason": "the loss of update 20 is nan; the weights are those before it"},
            "stopped itself",
            False,
        ),
        ("stopped", {"reason": "another message", "code": "loss_spike"}, "stopped itself", False),
        ("stopped", {"reason": "the loss of update 20 is nan", "code": None}, "stopped itself", False),
    ],
)
def test_runs_that_did_not_fail(built: Built, state: str, details: dict[str, Any], words: str, well: bool) -> None:
    built.metrics(range(20))
    built.state(state, 60.0, **details)
    found = explain(built.run)
    assert words in command("why", str(built.run.path)).out
    assert found.ok == well
    assert (found.cause is None) == well
    assert (found.code is None) == well


def test_a_live_run_is_reported_as_active(built: Built) -> None:
    built.plan(50)
    built.metrics(range(20))
    built.event(time.time() - START, "checkpoint")
    with built.run.held():
        headline = explain(built.run).headline
    assert re.fullmatch(
        r"the run is still active: training, update 20 of 50, last activity \d+ (?:s|min).* ago", headline
    )


def test_a_run_whose_supervisor_ended_unexpectedly(built: Built) -> None:
    built.state("training", 5.0, slurm_job_id="77")
    (limit,) = TEXTS["Slurm ended the job at its time limit"]
    built.log(0, "h0", "node", (39.0, limit))
    built.node_json(1, "h1", 38.0, [rank(2, alive=False, exit_code=-9)])
    found, text = explain(built.run), command("why", str(built.run.path)).out
    assert text.startswith(
        "the run is lost: its supervisor, process 4711 on h0, ended unexpectedly while training; last"
    )
    assert found.code == "supervisor_lost"
    assert "ranks on node 1 (h1) ended with -9" in text
    assert "see also the output of job 77" in text
    assert found.cause is not None and found.cause.name == "Slurm ended the job at its time limit"


def on_this_host(built: Built, seconds: float, **details: Any) -> None:
    """Writes a state that a launcher on this host entered `seconds` ago."""
    at = time.time() - START - seconds
    write_json(
        built.run.state_file,
        {"state": "training", "since": stamp(at), "host": socket.gethostname(), "pid": 1, **details},
    )
    built.event(at, "state", state="training")


@pytest.mark.parametrize("state", ["planning", "placing", "starting", "training", "exporting"])
def test_a_run_whose_launcher_was_killed_on_this_host_is_lost_at_once(built: Built, state: str) -> None:
    on_this_host(built, 1.0, state=state)
    with built.run.held() as held:
        assert held
        assert explain(built.run).headline.startswith(f"the run is still active: {state}")
    found = explain(built.run)
    assert (
        found.headline.startswith("the run is lost: its supervisor, process 1 on ") and found.code == "supervisor_lost"
    )
    assert found.cause is not None and "Continue with launcher resume" in found.cause.hint
    assert json.loads(command("status", str(built.run.path), "--json").out)["state"] == "lost"
    assert f"lost: its state is {state}, but no launcher holds" in command("status", str(built.run.path)).out


@pytest.mark.parametrize(("silent", "code"), [(61.0, "ray_lost"), (8.0, "supervisor_lost")])
def test_agents_that_ended_long_before_the_launcher_indicate_ray(built: Built, silent: float, code: str) -> None:
    """Ray ends a launcher that cannot reach it for a minute; the agents of a killed launcher end with it."""
    on_this_host(built, 100.0)
    touched = time.time() - 5.0
    for node in range(2):
        built.node_json(node, f"h{node}", touched - silent - START, [rank(node)])
    built.run.lock_file.touch()
    os.utime(built.run.lock_file, (touched, touched))
    found, text = explain(built.run), command("why", str(built.run.path)).out
    assert found.code == code
    assert ("Ray" in text) == (code == "ray_lost")


def test_a_failure_written_before_the_supervisor_ended_is_reported(built: Built) -> None:
    built.failure(40.0, failed(3, 1, "ValueError: odd rows"), failed(0, 0, GLOO))
    text = command("why", str(built.run.path)).out
    assert text.startswith("rank 3 on node 1 (h1) failed first, with exit code 1: ValueError: odd rows\n")
    assert "its supervisor ended before it wrote that the run failed" in text


def test_unencodable_characters_are_replaced(built: Built) -> None:
    built.log(1, "h1", "rank-3", (39.0, "naïve → ünïcode"))
    why(built, failed(3, 1, "ValueError: ‘odd’ rows"))
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for verb, wanted in (("why", b"ValueError: ?odd? rows"), ("logs", b"na?ve ? ?n?code")):
        argv = [str(Path(sys.executable).with_name("launcher")), verb, str(built.run.path)]
        done = subprocess.run(argv, capture_output=True, env=ascii_alone, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert wanted in done.stdout


def test_a_copied_run_directory_gives_the_same_explanation(built: Built, tmp_path: Path) -> None:
    _, text = why(built, failed(3, 1, "ValueError: odd rows"), failed(0, 0, GLOO))
    copy = Path(shutil.copytree(built.run.path, tmp_path / "elsewhere/copy"))
    moved = command("why", "copy", "--output-dir", str(copy.parent)).out
    assert moved == text.replace(str(built.run.path), str(copy))


def test_markup_and_control_sequences_in_a_log_are_not_interpreted(built: Built) -> None:
    built.log(1, "h1", "rank-3", (39.0, "[red]x[/] \x1b[2J\x1b]0;title\x07[/nonsense]"))
    _, text = why(built, failed(3, 1, "ValueError: [bold]\x1b[5mrows"))
    assert "[red]x[/] [/nonsense]" in text
    assert "ValueError: [bold]rows" in text
    assert "\x1b" not in text


def test_the_message_of_a_failed_run(built: Built) -> None:
    unknown = FailureCode.UNKNOWN
    assert failed_message(built.run, "node 1 (h1) is odd", unknown) == ("node 1 (h1) is odd", unknown)
    text, code = failed_message(built.run, "node 1 (h1) is blind", FailureCode.NOT_SHARED)
    assert text.startswith("node 1 (h1) is blind\n  hint: it must be on storage") and code == "not_shared"
    text, code = failed_message(built.run, "node 1 (h1): RuntimeError: CUDA out of memory", unknown)
    assert "\n  hint: set a smaller" in text and code == "out_of_gpu_memory"
    _, text = why(built, failed(3, 1, "ValueError: odd rows"))
    assert failed_message(built.run, "a message", unknown) == (text.rstrip("\n"), unknown)
    shutil.rmtree(built.run.path)
    assert failed_message(built.run, "a message", unknown) == ("a message", unknown)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("rank 3 at 0x7fa1 on h1:63681", "rank 12 at 0x7ffff00 on h2:5", True),
        ("[rank0]: cuda:0 took 1.25 s", "[rank7]: cuda:7 took 12.5 s", True),
        ("id 5f0c9a1be2d34f60", "id 00ac9a1be2d34f61", True),
        ("connect to 10.0.0.1:29500", "connect to 10.0.0.12:29501", True),
        ("/nodes/h1/data", "/nodes/h2/data", True),
        ('File "a.py", line 3, in x', 'File "a.py", line 4, in x', False),
        ("KeyError: 'a'", "KeyError: 'b'", False),
        ("faces and decades", "faced and decades", False),
    ],
)
def test_normalised_errors_do_not_depend_on_the_rank(one: str, other: str, same: bool) -> None:
    assert (normalised(one, ["h1", "h2"]) == normalised(other, ["h1", "h2"])) == same


def test_places_of_ranks_are_described() -> None:
    ranks = [Place(number, number // 4, f"h{number // 4}") for number in (0, 1, 2, 5, 7, 8)]
    assert describe_places(ranks) == "ranks 0-2 on node 0 (h0), ranks 5, 7 on node 1 (h1), rank 8 on node 2 (h2)"
    many = [Place(number, number, f"h{number}") for number in range(9)]
    assert describe_places(many, most=2) == "rank 0 on node 0 (h0), rank 1 on node 1 (h1) and on 7 more nodes"


def test_the_last_traceback() -> None:
    log = [*traceback(0, "OSError: a").splitlines(), "noise", *traceback(0, "package.MyError: b").splitlines(), "end"]
    found = last_traceback(log)
    assert found is not None and found.splitlines()[-1] == "package.MyError: b"
    assert last_traceback(["nothing", "here"]) is None


def test_a_hang_names_the_rank_that_differs_and_where_the_stacks_are(built: Built) -> None:
    text = (
        "no progress for 61 s while training, after 7 updates; rank 3 on node 1 (h1): its process is stopped (SIGSTOP)"
    )
    hung = failed(3, 1, None, how="a hang", code="hung") | {"error": text}
    stacks = [built.run.node_logs(node, f"h{node}") / "stacks.txt" for node in range(2)]
    dump = built.run.node_logs(1, "h1") / "nccl-rank-3"
    for file in (*stacks, dump):
        file.write_text("rank 3, process 7\n")
    found, shown = why(built, hung)
    assert shown.splitlines()[0] == f"the run hung: {text}"
    assert [note for note in found.notes if "stacks" in note] == [f"the stacks of the ranks: {file}" for file in stacks]
    assert f"the last collectives of a rank: {dump}" in found.notes
    assert found.code is FailureCode.HUNG and "train.hang_seconds" in shown
    # The other ranks only waited.
    assert [path.name for path, _ in found.log_ends] == ["rank-3.log"]


def test_only_the_stacks_and_dumps_of_the_last_attempt_are_listed(built: Built) -> None:
    """An earlier attempt hung too; its files are kept beside those of the last one."""
    folder = built.run.node_logs(0, "h0")
    for name in ("stacks.txt", "nccl-rank-0", "stacks.attempt-2.txt", "nccl-attempt-2-rank-1"):
        (folder / name).write_text("rank 0, process 7\n")
    hung = failed(1, 0, None, how="a hang", code="hung") | {"error": "no progress for 61 s"}
    built.event(40.0, "failure", attempt=2, failures=[hung], **hung)
    found, _ = why(built)
    assert [note for note in found.notes if "restart" not in note] == [
        f"the stacks of the ranks: {folder / 'stacks.attempt-2.txt'}",
        f"the last collectives of a rank: {folder / 'nccl-attempt-2-rank-1'}",
    ]


def test_only_the_last_attempt_is_explained(built: Built) -> None:
    """The first attempt failed in another way, and left logs with an error of its own."""
    built.log(1, "h1", "rank-3", "Traceback (most recent call last):", "ValueError: of the first attempt")
    built.failure(20.0, failed(3, 1, "ValueError: of the first attempt"))
    built.event(21.0, "restart", attempt=2, update=4, reason="rank 3 failed")
    built.state("placing", 22.0)
    built.nodes(["h0", "h1"], at=22.5)
    built.state("training", 23.0)
    built.log(0, "h0", "rank-1.attempt-2", "Traceback (most recent call last):", "OSError: of the second attempt")
    second = failed(1, 0, None, how="exit code 1", exit_code=1)
    built.event(39.0, "failure", **second, attempt=2, failures=[second])
    built.event(39.5, "no_restart", reason="the same error came twice after 9 updates: it is deterministic")
    found, text = why(built)
    assert "OSError: of the second attempt" in text and "first attempt" not in text
    assert [path.name for path, _ in found.log_ends] == ["rank-1.attempt-2.log"]
    assert "restarted 1 time before this failure" in found.notes
    assert "not restarted: the same error came twice after 9 updates: it is deterministic" in found.notes


def test_nodes_that_the_run_does_not_use_any_more_are_named(built: Built) -> None:
    exclude_node(built.run, "h1", "failed 2 times, the last time with no answer for 20 s")
    note = "excluded from this run: h1 failed 2 times, the last time with no answer for 20 s"
    found, text = why(built, failed(1, 0, None, how="exit code 1", exit_code=1))
    assert note in found.notes and note in text


def test_too_few_nodes_are_explained_with_those_that_are_excluded(built: Built) -> None:
    exclude_node(built.run, "h1", "torch sees 3 of the 4 assigned GPUs")
    reason = "after 600 s there are not enough free nodes: asked for 2 nodes with 4 GPU each; excluded: h1"
    built.state("failed", 50.0, reason=reason, code="not_enough_nodes")
    found = explain(built.run)
    assert found.notes == ("excluded from this run: h1 torch sees 3 of the 4 assigned GPUs",)
    assert found.code is FailureCode.NOT_ENOUGH_NODES
