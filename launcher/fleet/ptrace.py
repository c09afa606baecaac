"""Lets the agent read the stacks of its ranks. Standard library only: `run_script` imports it."""

from __future__ import annotations

import contextlib
import ctypes
import os

_PR_SET_PTRACER = 0x59616D61


def allow_agent() -> None:
    """Lets the parent of this process, and the processes that the parent starts, read the stack of this process.

    With kernel.yama.ptrace_scope=1, Ubuntu's default, only a parent of a process may do that, and py-spy is not one.
    Does nothing in a kernel without Yama. The permission stays when the process executes another program.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)
