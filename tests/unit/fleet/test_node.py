"""Which nodes take the places of nodes that are lost."""

from __future__ import annotations

import pytest

from launcher.fleet.node import Node, fill_places


def nodes(names: str) -> list[Node]:
    return [Node(f"agent of {name}", name, f"10.0.0.{name}", ()) for name in names.split()]


@pytest.mark.parametrize(
    ("active", "spare", "usable", "filled", "left"),
    [
        ("1 2", "3", "1 2 3", "1 2", "3"),
        # The others keep their places, so node 0 stays the one that all others connect to.
        ("1 2 3", "4 5", "1 3 4 5", "1 4 3", "5"),
        ("1 2", "3", "2 3", "3 2", ""),
        ("1 2", "3", "1", "1", ""),
        ("1 2", "3 4", "1 4", "1 4", ""),
        ("1 2 3", "", "1 3", "1 3", ""),
        ("1 2 3", "4", "1", "1", ""),
        ("1 2 3", "4", "3 4", "4 3", ""),
        ("", "", "", "", ""),
    ],
)
def test_spare_nodes_take_the_places_of_lost_nodes(
    active: str, spare: str, usable: str, filled: str, left: str
) -> None:
    assert fill_places(nodes(active), nodes(spare), nodes(usable)) == (nodes(filled), nodes(left))
