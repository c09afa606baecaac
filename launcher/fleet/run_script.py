"""The leash of a script: `python -m launcher.fleet.run_script FOLDER ARGUMENTS…` becomes `python ARGUMENTS…` in FOLDER.

Scripts hear no orders. So the process that the agent started leaves a watcher behind, in its own process group, and
then turns into the script: the rank's process id, exit status, signals, memory and stack are the script's own. The
watcher holds the agent's line, which was standard input. Where that closes, the agent is gone, and the whole group is
killed. The order to stop is passed on once, as SIGTERM, and a script that does not end in time is killed.

Standard library alone: this runs once a rank, before whatever the script imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

STOP_GRACE_SECONDS = 60
"""What a script has for saving after SIGTERM."""


def main() -> None:
    """Does not return: the process becomes the script."""
    folder, *arguments = sys.argv[1:]
    os.chdir(folder)
    environment = {**os.environ, **companions(os.environ), "LAUNCHER_REPORT_PID": str(os.getpid())}
    # Under Slurm the agent and what it starts have SIGTERM blocked. A script may save when it gets one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _leave_watcher()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execve(sys.executable, [sys.executable, *filled(arguments, os.environ)], environment)


def companions(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun and the deepspeed launcher set besides the variables that every rank has.

    Not TORCHELASTIC_USE_AGENT_STORE: with it torch.distributed takes torchrun's own store to be there.
    """
    rank, world, node = (environment[name] for name in ("RANK", "WORLD_SIZE", "GROUP_RANK"))
    local = environment["LOCAL_WORLD_SIZE"]
    nodes = str(int(world) // int(local))
    torchrun = {"ROLE_RANK": rank, "ROLE_WORLD_SIZE": world, "ROLE_NAME": "default", "GROUP_WORLD_SIZE": nodes}
    torchrun |= {"TORCHELASTIC_RUN_ID": Path(environment["LAUNCHER_RUN_DIR"]).name}
    torchrun |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    return {**torchrun, "LOCAL_SIZE": local, "CROSS_RANK": node, "CROSS_SIZE": nodes}


def filled(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments with what differs between ranks in the place of {rank} and {local_rank}."""
    values = {"{rank}": environment["RANK"], "{local_rank}": environment["LOCAL_RANK"]}
    for name, value in values.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    return list(arguments)


def _leave_watcher() -> None:
    """Forks twice, so that the script does not find a child that it knows nothing of."""
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
    """Passes orders on until there are no more, which is when the agent is gone."""
    signal.signal(signal.SIGALRM, lambda *_: _kill_group())
    # The agent signals the group; what comes of it is the script's to decide.
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
