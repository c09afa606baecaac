"""Prints where a pytest run spent its time: the slowest tests, and the seconds of each folder of tests."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

SLOWEST = 20


class Budget:
    """Adds up the set-up, call and teardown of every test. With xdist it belongs to the controller alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("time budget")
        for line in table(self.seconds):
            terminalreporter.line(line)


def table(seconds: Counter[str]) -> list[str]:
    """Lines with the slowest tests, the seconds of each folder, and their sum. Tests that ran at once all count."""
    folders: Counter[str] = Counter()
    for test, spent in seconds.items():
        folders[folder_of(test)] += spent
    tests = [f"{spent:8.1f} s  {test}" for test, spent in seconds.most_common(SLOWEST)]
    each = [f"{spent:8.1f} s  {folder}" for folder, spent in folders.most_common()]
    return [*tests, "", *each, f"{sum(folders.values()):8.1f} s  in all"]


def folder_of(test: str) -> str:
    """tests/unit/PACKAGE, tests/local or tests/cluster of a test's id."""
    folder = PurePosixPath(test.partition("::")[0]).parent
    return str(PurePosixPath(*folder.parts[: 3 if "unit" in folder.parts[:2] else 2]))
