"""A rank that the kernel kills because the memory of its control group is full."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.local import launcher_commands
from tests.local.fault_runs import Start, check_results, let_continue
from tests.local.launcher_commands import run_folder
from tests.needs import need

pytestmark = pytest.mark.local

_MORE_BYTES = 256 * 2**20
_V1 = Path("/sys/fs/cgroup/memory")


class Group:
    """A memory control group: of version 1, or of version 2."""

    def __init__(self) -> None:
        self._v1 = _V1.is_dir()
        root = _V1 if self._v1 else Path("/sys/fs/cgroup")
        self.folder = root / f"launcher-test-{os.getpid()}"
        self.folder.mkdir()

    @property
    def members(self) -> Path:
        return self.folder / "cgroup.procs"

    def limit(self, more_bytes: int) -> None:
        """From now on the group may use so much more."""
        used = self.folder / ("memory.usage_in_bytes" if self._v1 else "memory.current")
        limit = self.folder / ("memory.limit_in_bytes" if self._v1 else "memory.max")
        limit.write_text(str(int(used.read_text()) + more_bytes))


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        group = Group()
        missing = None if (group.folder / "cgroup.procs").exists() else "no memory control group can be made"
    except OSError as error:
        missing = f"no memory control group can be made: {error}"
    need(missing)
    yield group
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            group.folder.rmdir()
            return
        time.sleep(0.1)


def test_a_rank_that_the_kernel_kills_for_lack_of_memory(
    without_fault: dict[str, object],
    started: Start,
    forked: dict[str, str],
    group: Group,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher, its Ray, its agent and its ranks are in a control group, as in a Slurm job or a container."""
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.members)]
    plain = launcher_commands.launcher_with
    monkeypatch.setattr(launcher_commands, "launcher_with", lambda *given: [*enter, *plain(*given)])
    running = started("full memory", forked)
    for rank in running.ranks().values():
        # Forks of the test's server. Others would inherit both from the agent.
        group.members.write_text(str(rank.pid))
        Path(f"/proc/{rank.pid}/oom_score_adj").write_text("1000")
    group.limit(_MORE_BYTES)
    let_continue(running)
    check_results(running, without_fault, attempts=2)
    run = RunDir(run_folder(running.folder))
    (failure,) = [event for event in run.events() if event["event"] == "failure"]
    assert (failure["rank"], failure["code"]) == (1, "out_of_memory")
    assert "rank 1 on node 0" in running.output
    assert "failed first, with signal SIGKILL, from the kernel for lack of memory" in running.output
