"""Lets the agent read the stacks of its ranks. Standard library only: `run_script` imports it."""

from __future__ import annotations

import contextlib
import ctypes
import os

_PR_SET_PTRACER = 0x59616D61
AGENT_VARIABLE = "LAUNCHER_AGENT_PID"
"""The agent's process id, in the environment of its ranks."""


def allow_agent() -> None:
    """Lets the agent, and the processes that it starts, read the stack of this process.

    The agent is the process that AGENT_VARIABLE names, else the parent. With kernel.yama.ptrace_scope=1, Ubuntu's
    default, only a parent of a process may do that: py-spy is not one, nor is the agent of a forked rank. Does nothing
    in a kernel without Yama. The permission stays when the process executes another program.
    """
    with contextlib.suppress(OSError, AttributeError):
        agent = int(os.environ.get(AGENT_VARIABLE) or os.getppid())
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(agent), 0, 0, 0)
