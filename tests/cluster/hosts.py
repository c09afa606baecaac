"""Several hosts on one machine: each with its own addresses, host name, process table, /tmp, /run and /dev/shm.

A host is a set of Linux namespaces, kept by a first process that reaps what is orphaned on it. The network between
hosts is a bridge inside the namespace of one more host, `ctl`, so nothing of a testbed is visible outside:
two testbeds have the same addresses and do not clash, and all of one ends with the processes that keep it, even where
the tests are killed. The disk is shared, as it is between the nodes of a cluster, but for /tmp.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.fork_server import REPOSITORY, server_command, variables_for

CONTROLLER = "ctl"
_PARENT, _PREFIX = Path("/var/tmp"), "launcher-testbed-"
_FORK_SERVER = Path("/run/fork-server.json")
CPU_ONLY = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_LIVE, _DEAD = "10.77.0", "10.66.0"
_TOOLS = {"iproute2": ("ip", "tc"), "util-linux": ("nsenter", "unshare", "setpriv", "mount")}

# $1 the host's name, $2 its own folder. /sys is mounted anew so that it shows this host's network, and keeps the
# control groups, without which slurmd does not start.
_BOOT = """
set -e
hostname "$1"
mount --bind "$2/tmp" /tmp
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t tmpfs tmpfs /dev/shm
mount --rbind /sys/fs/cgroup "$2/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$2/cgroup" /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/lock
echo up > "$2/booted"
sleep infinity &
while :; do wait; done
"""


def missing() -> str | None:
    """Why this machine cannot have hosts; None if it can."""
    if os.geteuid() != 0:
        return "hosts on this machine need root"
    for package, commands in _TOOLS.items():
        if absent := [command for command in commands if shutil.which(command) is None]:
            return f"{', '.join(absent)} is missing: apt-get install {package}"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    return f"namespaces may not be made here: {done.stderr.strip()}" if done.returncode else None


class HostProcess:
    """A command that runs on a host, with its output in a file. `process` is the nsenter process that started it."""

    def __init__(self, host: str, argv: Sequence[str], process: subprocess.Popen[bytes], output: Path) -> None:
        self.host, self.argv, self.process, self.output_file = host, list(argv), process, output

    @property
    def output(self) -> str:
        """What it has printed so far, including errors."""
        return self.output_file.read_text(errors="replace")

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Signals the command itself from outside its host."""
        for child in psutil.Process(self.process.pid).children():
            child.send_signal(number)

    def wait_for(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Waits until the condition holds while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"{self.argv} on {self.host} ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {seconds} s; {self.argv} printed:\n{self.output}"
            time.sleep(0.05)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.argv} on {self.host} runs after {seconds} s:\n{self.output}") from None

    def end(self) -> None:
        """Kills the command, which dies with its nsenter process."""
        self.process.kill()
        self.process.wait()


class Hosts:
    """Hosts h1…hN, and `ctl`, which is their network's switch and has no ranks to run.

    `dead_interface` gives every host a second interface, dead0: it is up, comes first by name, has an address in a
    subnet that all hosts seem to share, and leads nowhere. `dead_name` makes a host's own name mean that address on the
    host itself, and `dead_route` sends what has no other way through it.
    """

    def __init__(self, *, dead_interface: bool = False, dead_name: bool = False, dead_route: bool = False) -> None:
        self._dead, self._dead_name, self._dead_route = dead_interface, dead_name, dead_route
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}
        self._fork_servers: dict[str, HostProcess] = {}
        self._outputs = 0
        self.names: list[str] = []
        self.on_boot: list[Callable[[str], None]] = []
        self.environment: dict[str, str] = {}

    def up(self, count: int) -> Hosts:
        """Starts `ctl` and `count` hosts. If this fails, it ends what it started."""
        _sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_PARENT))
        self.shared, self.home = self.folder / "shared", self.folder / "home"
        try:
            self.folder.chmod(0o755)
            self.shared.mkdir()
            self.home.mkdir(mode=0o700)
            self.names = [f"h{index}" for index in range(1, count + 1)]
            self.environment = {**_clean_environment(), "HOME": str(self.home)}
            self._power_on_controller()
            for name in self.names:
                self.power_on(name)
        except BaseException:
            self.down()
            raise
        return self

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def address(self, host: str) -> str:
        """The address at which the other hosts reach this one."""
        return f"{_LIVE}.{self._number(host)}"

    def dead_address(self, host: str) -> str:
        """The address of the interface that leads nowhere."""
        return f"{_DEAD}.{self._number(host)}"

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        check: bool = True,
        seconds: float = 120.0,
        cwd: Path | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """What a command on a host printed and how it ended; its working folder is `shared` by default."""
        done = subprocess.run(
            self._entering(host, argv, cwd),
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        said = f"{list(argv)} on {host} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert not check or done.returncode == 0, said
        return done

    def popen(self, host: str, argv: Sequence[str], *, cwd: Path | None = None, **environment: str) -> HostProcess:
        """Starts a command on a host without waiting for it. It ends with the host at the latest."""
        self._outputs += 1
        output = self.folder / f"output-{self._outputs}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self._entering(host, argv, cwd),
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return HostProcess(host, argv, process, output)

    def processes(self, host: str) -> list[psutil.Process]:
        """Every process of a host but its first and its fork server, as seen from outside."""
        init = self._inits[host]
        namespace = _pid_namespace(init)
        if namespace is None:
            return []
        found = [process for process in psutil.process_iter() if _pid_namespace(process.pid) == namespace]
        keeping = {init, *(process.pid for process in found if _keeps_running(process, init))}
        keeping |= {process.pid for process in self._fork_server(host)}
        return [process for process in found if process.pid not in keeping]

    def command_lines(self, host: str) -> list[list[str]]:
        """The arguments of every process of a host, without those that end in the meantime."""
        found = []
        for process in self.processes(host):
            with contextlib.suppress(psutil.Error):
                found.append(process.cmdline())
        return found

    def start_fork_servers(self) -> dict[str, str]:
        """Starts a fork server on every host h1…hN that has none; the variables with which a host's processes use it.

        On `ctl`, and on a host that was powered on since, the same variables change nothing.
        """
        for host in self.names:
            if host not in self._fork_servers:
                command = server_command(_FORK_SERVER)
                self._fork_servers[host] = self.popen(host, command, cwd=REPOSITORY, **CPU_ONLY)
        return variables_for(_FORK_SERVER)

    def forks(self, host: str) -> list[psutil.Process]:
        """The ranks and other processes that a host's fork server forked and that still run."""
        return [child for server in self._fork_server(host)[1:] for child in server.children(recursive=True)]

    def _fork_server(self, host: str) -> list[psutil.Process]:
        """The process that started the server, below the one that entered the host for it, and the server."""
        if host not in self._fork_servers:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            starters = psutil.Process(self._fork_servers[host].process.pid).children()
            return [*starters, *(server for starter in starters for server in starter.children())]
        return []

    def cut(self, host: str) -> None:
        """Takes a host off the network; its processes keep running."""
        self._on_switch("ip", "link", "set", f"to-{host}", "down")

    def join(self, host: str) -> None:
        """Brings a host back to the network."""
        self._on_switch("ip", "link", "set", f"to-{host}", "up")

    def slow_down(self, host: str, speed: str) -> None:
        """Limits the speed at which a host sends to the others, such as "40mbit", until `full_speed`."""
        limit = ("rate", speed, "burst", "64kb", "latency", "50ms")
        self._on_host(host, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)

    def full_speed(self, host: str) -> None:
        """Removes the limit of `slow_down`."""
        self._on_host(host, "tc", "qdisc", "del", "dev", "eth0", "root")

    def power_off(self, host: str) -> None:
        """Kills every process of a host at once."""
        keeper = self._keepers.pop(host)
        self._fork_servers.pop(host, None)
        os.kill(self._inits.pop(host), signal.SIGKILL)
        keeper.wait(30)
        for port in self._ports(host):
            # The kernel removes a dead host's interfaces when it comes to it.
            self._on_switch("ip", "link", "del", port, check=False)

    def power_on(self, host: str) -> None:
        """Boots a host that is off. Its /tmp is empty, and only what `on_boot` starts runs on it."""
        assert host not in self._keepers, f"{host} is on"
        self._boot(host)
        pid = str(self._inits[host])
        self._connect(pid, f"to-{host}", "eth0", self.address(host))
        self._on_switch("ip", "link", "set", f"to-{host}", "master", "switch")
        if self._dead:
            self._connect(pid, f"dead-{host}", "dead0", self.dead_address(host))
        through = f"{_DEAD}.1" if self._dead and self._dead_route else f"{_LIVE}.1"
        _call("nsenter", f"--net=/proc/{pid}/ns/net", "ip", "route", "add", "default", "via", through)
        for start in self.on_boot:
            start(host)

    def down(self) -> None:
        """Ends every host and removes the testbed's folder. May be called again."""
        for host in list(self._keepers):
            self.power_off(host)
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _power_on_controller(self) -> None:
        self._boot(CONTROLLER)
        for words in ("link set lo up", "link add switch type bridge", f"addr add {_LIVE}.1/24 dev switch"):
            self._on_switch("ip", *words.split())
        self._on_switch("ip", "link", "set", "switch", "up")

    def _boot(self, host: str) -> None:
        own = self.folder / host
        shutil.rmtree(own / "tmp", ignore_errors=True)
        for name in ("tmp", "cgroup"):
            (own / name).mkdir(parents=True, exist_ok=True)
        (own / "tmp").chmod(0o1777)
        (own / "booted").unlink(missing_ok=True)
        (own / "hosts").write_text(self._hosts_file(host))
        # Without a name server, since one that does not answer keeps Ray waiting for names that stand in /etc/hosts.
        (own / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        namespaces = [
            "unshare",
            "--net",
            "--uts",
            "--ipc",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        log = own / "boot.log"
        with log.open("wb") as output:
            self._keepers[host] = keeper = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", _BOOT, "sh", host, str(own)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _wait(lambda: (own / "booted").exists(), lambda: f"{host} did not boot: {log.read_text()}", keeper)
        self._inits[host] = psutil.Process(keeper.pid).children()[0].pid

    def _connect(self, pid: str, port: str, interface: str, address: str) -> None:
        """A cable from the switch's `port` to a host's `interface`, whose hardware address outlives a power-off."""
        hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        cable = ("type", "veth", "peer", "name", interface, "address", hardware, "netns", pid)
        self._on_switch("ip", "link", "add", port, *cable)
        inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
        _call(*inside, "addr", "add", f"{address}/24", "dev", interface)
        for name in ("lo", interface):
            _call(*inside, "link", "set", name, "up")
        self._on_switch("ip", "link", "set", port, "up")

    def _hosts_file(self, host: str) -> str:
        addresses = {CONTROLLER: f"{_LIVE}.1", **{name: self.address(name) for name in self.names}}
        if self._dead and self._dead_name and host != CONTROLLER:
            addresses[host] = self.dead_address(host)
        return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())

    def _entering(self, host: str, argv: Sequence[str], cwd: Path | None) -> list[str]:
        """`argv` on a host. It dies with the nsenter process, since a signal to that would not reach it otherwise."""
        enter = ["nsenter", "--target", str(self._inits[host]), "--net", "--uts", "--ipc", "--mount", "--pid"]
        return [*enter, f"--wd={cwd or self.shared}", "setpriv", "--pdeathsig", "KILL", "--", *argv]

    def _ports(self, host: str) -> list[str]:
        """The switch's ends of a host's cables; none where the switch itself is off."""
        if CONTROLLER not in self._inits:
            return []
        return [f"to-{host}", *([f"dead-{host}"] if self._dead else [])]

    def _on_switch(self, *argv: str, check: bool = True) -> None:
        _call("nsenter", f"--net=/proc/{self._inits[CONTROLLER]}/ns/net", *argv, check=check)

    def _on_host(self, host: str, *argv: str) -> None:
        _call("nsenter", f"--net=/proc/{self._inits[host]}/ns/net", *argv)

    def _number(self, host: str) -> int:
        return 1 if host == CONTROLLER else 10 + int(host.removeprefix("h"))


@contextlib.contextmanager
def several_hosts(count: int, **options: bool) -> Iterator[Hosts]:
    """Hosts h1…h<count> until the end of the block; `options` are those of Hosts."""
    with Hosts(**options) as hosts:
        yield hosts.up(count)


def _clean_environment() -> Mapping[str, str]:
    """The environment without variables by which a process would find another cluster."""
    foreign = ("RAY_", "SLURM", "PYTEST_", "MASTER_", "LAUNCHER_", "XDG_", "SSH_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


def _call(*argv: str, check: bool = True) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert not check or done.returncode == 0, f"{' '.join(argv)} failed: {done.stderr}"


def _wait(
    condition: Callable[[], object], told: Callable[[], str], process: subprocess.Popen[bytes], seconds: float = 20.0
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, told()
        time.sleep(0.01)


def _pid_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _keeps_running(process: psutil.Process, init: int) -> bool:
    """Whether this is the process that keeps a host's first process, `init`, running."""
    try:
        return process.ppid() == init and process.cmdline() == ["sleep", "infinity"]
    except psutil.Error:
        return False


def _sweep() -> None:
    """Removes the folders of testbeds whose tests were killed: their hosts died with them."""
    for folder in _PARENT.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
