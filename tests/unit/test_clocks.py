"""Which code reads the clock that may be set: durations and waits use one that does not jump."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "launcher"
READERS = {
    "files.py": "utc_now: the times in a run's files",
    "lock.py": "the age of a lock's heartbeat if the file system's time cannot be read",
    "reporting.py": "a report",
    "cli/logs.py": "which lines are shown, by their times",
    "cli/status.py": "how long ago something was written",
    "fleet/agent.py": "the clock that nodes compare; which files in /dev/shm are newer than the ranks",
    "fleet/draining.py": "until the time of day at which Ray ends a drained node",
    "fleet/node_network.py": "comparing the clocks of nodes",
    "fleet/nodes.py": "a report",
    "fleet/process.py": "a report",
    "run_dir.py": "the name of a run",
    "runs/cancel.py": "how long ago something was written",
    "runs/supervisor.py": "a report",
    "watch/end_of_run.py": "how long ago something was written",
    "watch/screen.py": "how long ago something was written",
    "watch/why.py": "how long ago something was written",
    "worker/__main__.py": "reports",
    "worker/control.py": "a report",
    "worker/train.py": "reports",
}
"""The modules that read the time of day, and what for. A report's time is compared only with those of other ranks."""
_CALLS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}


def reads_time_of_day(source: str) -> bool:
    """Whether code reads the clock that may be set, also without calling it at once."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return any(isinstance(node.value, ast.Name) and (node.value.id, node.attr) in _CALLS for node in found)


def test_only_these_modules_read_the_time_of_day() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if reads_time_of_day(path.read_text())
    }
    assert found == READERS.keys(), "use time.monotonic() for a duration or a wait, or add the module with its reason"


def test_no_module_imports_the_function_itself() -> None:
    """It would not be found above."""
    names = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
    }
    assert names.isdisjoint({"time", "time_ns"})
