"""The testbed itself: it has several hosts and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts, missing, several_hosts
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster


def reaches(hosts: Hosts, one: str, address: str) -> bool:
    """Whether a connection is answered, be it refused."""
    code = "import socket, sys; s = socket.socket(); s.settimeout(0.5); sys.exit(s.connect_ex((sys.argv[1], 9)) != 111)"
    return hosts.run(one, ["python3", "-c", code, address], check=False).returncode == 0


def test_hosts_have_names_addresses_process_tables_and_tmp_of_their_own(hosts: Hosts) -> None:
    for host in hosts.names:
        assert hosts.run(host, ["hostname"]).stdout.strip() == host
        assert f"inet {hosts.address(host)}/24" in hosts.run(host, ["ip", "-4", "addr", "show", "eth0"]).stdout
        assert sorted(hosts.run(host, ["ls", "/sys/class/net"]).stdout.split()) == ["eth0", "lo"]
        assert hosts.run(host, ["ls", "/tmp", "/dev/shm"]).stdout.split() == ["/dev/shm:", "/tmp:"]
    sleeper = hosts.popen("h1", ["sleep", "987654"])
    sleeper.wait_for(lambda: ["sleep", "987654"] in hosts.command_lines("h1"))
    assert "sleep 987654" in hosts.run("h1", ["ps", "-eo", "args"]).stdout
    assert "sleep 987654" not in hosts.run("h2", ["ps", "-eo", "args"]).stdout
    hosts.run("h1", ["touch", "/tmp/mine"])
    assert hosts.run("h2", ["ls", "/tmp"]).stdout == ""
    sleeper.signal()
    assert sleeper.wait(5) != 0
    assert hosts.processes("h1") == []


def test_hosts_are_cut_off_joined_powered_off_and_on(hosts: Hosts) -> None:
    h2 = hosts.address("h2")
    assert reaches(hosts, "h1", h2) and reaches(hosts, "h1", "h3")
    hosts.cut("h2")
    assert not reaches(hosts, "h1", h2)
    assert reaches(hosts, "h1", "h3")
    hosts.join("h2")
    assert reaches(hosts, "h1", h2)
    sleeper = hosts.popen("h2", ["sleep", "987654"])
    hosts.run("h2", ["touch", "/tmp/old"])
    hosts.power_off("h2")
    sleeper.wait(5)
    assert not reaches(hosts, "h1", h2)
    hosts.power_on("h2")
    assert reaches(hosts, "h1", h2)
    assert hosts.run("h2", ["ls", "/tmp"]).stdout == ""


def test_a_second_testbed_has_a_dead_interface_and_leaves_nothing(hosts: Hosts) -> None:
    before = set(Path("/sys/class/net").iterdir())
    with several_hosts(2, dead_interface=True, dead_name=True, dead_route=True) as others:
        keepers = [psutil.Process(pid) for pid in others._inits.values()]
        assert hosts.run("h1", ["hostname", "-i"]).stdout.strip() == hosts.address("h1")
        assert others.run("h1", ["hostname", "-i"]).stdout.strip() == others.dead_address("h1")
        assert reaches(others, "h1", others.address("h2"))
        assert not reaches(others, "h1", others.dead_address("h2"))
        assert sorted(others.run("h1", ["ls", "/sys/class/net"]).stdout.split())[0] == "dead0"
        assert "dev dead0" in others.run("h1", ["ip", "route", "get", "8.8.8.8"]).stdout
        assert others.run("h1", ["cat", "/sys/class/net/dead0/operstate"]).stdout.strip() == "up"
        others.popen("h2", ["setsid", "sleep", "987654"])
        folder = others.folder
    assert not any(process.is_running() for process in keepers)
    assert not folder.exists()
    assert set(Path("/sys/class/net").iterdir()) == before


KILLED = """
import os, signal
from tests.cluster.hosts import Hosts
hosts = Hosts().up(1)
print(hosts.folder, *hosts._inits.values(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_hosts_die_with_tests_that_are_killed() -> None:
    need(missing())
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=root, capture_output=True, text=True, timeout=60)
    folder, *inits = done.stdout.split()
    assert len(inits) == 2, done.stderr
    psutil.wait_procs([psutil.Process(int(pid)) for pid in inits if psutil.pid_exists(int(pid))], timeout=5)
    assert not any(psutil.pid_exists(int(pid)) for pid in inits)
    assert Path(folder).exists()
    with several_hosts(1):
        assert not Path(folder).exists()


def test_slurm_starts_tasks_on_every_host_and_takes_one_back(slurm: Slurm) -> None:
    hosts = slurm.hosts
    listed = hosts.run("ctl", ["srun", "--nodes=3", "--ntasks-per-node=1", "hostname"]).stdout
    assert sorted(listed.split()) == ["h1", "h2", "h3"]
    # A host that is off before Slurm heard of its job's end stays "completing" for minutes.
    slurm.wait_idle()
    hosts.power_off("h3")
    hosts.power_on("h3")
    slurm.wait_idle()
    assert hosts.run("h1", ["srun", "--nodelist=h3", "hostname"]).stdout.strip() == "h3"
