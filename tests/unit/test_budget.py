"""The time budget that a pytest run prints at its end."""

from __future__ import annotations

from collections import Counter

from tests.budget import SLOWEST, folder_of, table


def test_a_test_belongs_to_its_package_or_kind() -> None:
    assert folder_of("tests/unit/fleet/test_agent.py::test_x[a/b::c]") == "tests/unit/fleet"
    assert folder_of("tests/unit/test_files.py::test_x") == "tests/unit"
    assert folder_of("tests/local/test_run.py::test_x") == "tests/local"


def test_the_table_has_the_slowest_tests_and_the_sum_of_every_folder() -> None:
    seconds = Counter({f"tests/local/test_a.py::test_{number}": float(number) for number in range(30)})
    seconds["tests/cluster/test_b.py::test_b"] = 1000.0
    lines = table(seconds)
    assert lines[0] == "  1000.0 s  tests/cluster/test_b.py::test_b"
    assert lines[1].endswith("test_29") and lines[SLOWEST] == ""
    assert lines[SLOWEST + 1 :] == ["  1000.0 s  tests/cluster", "   435.0 s  tests/local", "  1435.0 s  in all"]
