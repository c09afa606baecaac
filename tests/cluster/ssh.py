"""Hosts reached over ssh: an sshd on each, with its own host key, that accepts one user key and no password."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.cluster.hosts import Hosts

_TOOLS = {"openssh-server": ("sshd",), "openssh-client": ("ssh", "ssh-keygen"), "rsync": ("rsync",)}
_CONFIGURATION = """
ListenAddress {address}
HostKey {own}/host_key
PidFile {own}/sshd.pid
AuthorizedKeysFile {key}.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
"""


def missing() -> str | None:
    """Why hosts on this machine cannot be reached over ssh; None if they can."""
    for package, commands in _TOOLS.items():
        if absent := [command for command in commands if shutil.which(command) is None]:
            return f"{', '.join(absent)} is missing: apt-get install {package}"
    return None


def start_sshd(hosts: Hosts) -> Path:
    """Starts an sshd on every host; returns the private key that they accept, which is in the shared home."""
    key = hosts.home / ".ssh" / "id_ed25519"
    key.parent.mkdir(mode=0o700)
    _make_key(key)
    for host in hosts.names:
        _make_home(hosts, host)
        own = hosts.folder / host
        _make_key(own / "host_key")
        configuration = own / "sshd_config"
        configuration.write_text(_CONFIGURATION.format(address=hosts.address(host), own=own, key=key))
        hosts.run(host, [str(shutil.which("sshd")), "-f", str(configuration), "-E", str(own / "sshd.log")])
    return key


def home_of(hosts: Hosts, host: str) -> Path:
    """The home folder of a user who logs in to a host."""
    return hosts.folder / host / "home"


def _make_home(hosts: Hosts, host: str) -> None:
    """Gives root another home on a host, where ssh and shells look for it: /root belongs to the machine."""
    home_of(hosts, host).mkdir()
    (home_of(hosts, host) / ".bashrc").touch()
    users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    changed = [[*user[:5], str(home_of(hosts, host)), *user[6:]] if user[0] == "root" else user for user in users]
    passwd = hosts.folder / host / "passwd"
    passwd.write_text("".join(":".join(user) + "\n" for user in changed))
    hosts.run(host, ["mount", "--bind", str(passwd), "/etc/passwd"])


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)
