"""Simulated hosts on which real Slurm and real Ray run. They need root.

Each worker of pytest-xdist has its own hosts, which do not clash.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts as several
from tests.cluster import slurm as over_hosts
from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm
from tests.needs import need


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Three hosts, h1 to h3. A test ends what it starts on them and restores what it cuts off or powers off."""
    need(several.missing())
    with several.several_hosts(3) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Slurm:
    """Slurm over the three hosts, which are `slurm.hosts`."""
    need(over_hosts.missing())
    return Slurm(hosts).start()


@pytest.fixture
def shared(hosts: Hosts) -> Path:
    """A new folder that all hosts see. They do not see tmp_path, which is in /tmp."""
    folder = hosts.shared / uuid.uuid4().hex[:8]
    folder.mkdir()
    return folder
