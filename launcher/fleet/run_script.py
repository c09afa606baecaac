"""Runs a user's script as a rank: `python -m launcher.fleet.run_script FOLDER ARGUMENTS…` becomes `python ARGUMENTS…`.

The process that the agent started forks a watcher in its process group, changes to FOLDER and then executes the script:
the rank's process id, exit status, signals, memory and stack are those of the script. The watcher reads the agent's
orders from what was standard input. When it closes, the agent is gone, and the watcher kills the whole group. It passes
the order to stop on once, as SIGTERM, and kills a script that does not end in time.

Imports only the standard library, also through ptrace: this runs once per rank, before the imports of the script.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launcher.fleet.ptrace import allow_agent

STOP_GRACE_SECONDS = 60
"""The time that a script has after SIGTERM, for saving."""


def main() -> None:
    """Runs the script in this process: as another program, or, in a fork with its libraries, as Python would."""
    folder, *arguments = sys.argv[1:]
    os.chdir(folder)
    environment = {**os.environ, **torchrun_variables(os.environ), "LAUNCHER_REPORT_PID": str(os.getpid())}
    allow_agent()
    _receive_signals()
    _fork_watcher()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arguments = fill_placeholders(arguments, os.environ)
    if "torch" in sys.modules:
        # This is a fork of a process that has imported the libraries: another program would import them again.
        os.environ.update(environment)
        run_here(arguments)
    else:
        os.execve(sys.executable, [sys.executable, *arguments], environment)


def run_here(arguments: Sequence[str]) -> None:
    """Runs the script in this process, as `python ARGUMENTS…` does."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that torchrun and the deepspeed launcher set besides those that every rank has.

    TORCHELASTIC_USE_AGENT_STORE is left out: with it torch.distributed expects torchrun's own store.
    """
    rank, world, node = (environment[name] for name in ("RANK", "WORLD_SIZE", "GROUP_RANK"))
    local = environment["LOCAL_WORLD_SIZE"]
    nodes = str(int(world) // int(local))
    torchrun = {"ROLE_RANK": rank, "ROLE_WORLD_SIZE": world, "ROLE_NAME": "default", "GROUP_WORLD_SIZE": nodes}
    torchrun |= {"TORCHELASTIC_RUN_ID": Path(environment["LAUNCHER_RUN_DIR"]).name}
    torchrun |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    return {**torchrun, "LOCAL_SIZE": local, "CROSS_RANK": node, "CROSS_SIZE": nodes}


def fill_placeholders(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments with {rank} and {local_rank} replaced by their values."""
    values = {"{rank}": environment["RANK"], "{local_rank}": environment["LOCAL_RANK"]}
    for name, value in values.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    return list(arguments)


def _receive_signals() -> None:
    """Unblocks the signals that the agent and its children block: a script may use them to save.

    SIGUSR1 and SIGUSR2 do not end a script that does not handle them.
    """
    warnings = {signal.SIGUSR1, signal.SIGUSR2} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in warnings:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, *warnings})


def _fork_watcher() -> None:
    """Forks twice, so that the watcher is not a child of the script."""
    script = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        with os.fdopen(os.dup(0), "rb") as orders:
            watch(orders, script)
    finally:
        _kill_group()


def watch(orders: Iterable[bytes], script: int) -> None:
    """Handles orders until the agent is gone."""
    signal.signal(signal.SIGALRM, lambda *_: _kill_group())
    # The agent signals the whole group, but only the script decides when to end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stopped = False
    for line in orders:
        if "stop" in json.loads(line) and not stopped:
            stopped = True
            os.kill(script, signal.SIGTERM)
            signal.alarm(STOP_GRACE_SECONDS)


def _kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
