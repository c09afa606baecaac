"""A real Slurm over a testbed: the controller on `ctl`, a slurmd on every host, and one munged with a new key."""

from __future__ import annotations

import os
import shutil
import time

from tests.cluster.hosts import CONTROLLER, Hosts

_SOCKET = "/run/munge/munge.socket.2"
# More than the machine has: several jobs share a host, and what a test asks for does not depend on the machine.
CPUS_OF_HOST, GPUS_OF_HOST = 8, 4
_TOOLS = {"slurm-wlm": ("slurmctld", "slurmd", "srun", "sbatch", "scontrol"), "munge": ("munged",)}


def missing() -> str | None:
    """Why this machine cannot run Slurm; None if it can."""
    for package, commands in _TOOLS.items():
        if absent := [command for command in commands if shutil.which(command) is None]:
            return f"{', '.join(absent)} is missing: apt-get install {package}"
    return None


class Slurm:
    """Slurm on all hosts, which find it through SLURM_CONF in their environment. It ends with the hosts."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.conf = hosts.folder / "slurm.conf"
        self._own = hosts.folder / "slurm"

    def start(self) -> Slurm:
        """Returns once every host is idle. Raises AssertionError with the end of the logs."""
        for name in ("munge", "state"):
            (self._own / name).mkdir(parents=True)
        self._own.chmod(0o755)
        self.conf.write_text(self._configuration())
        devices = self._devices()
        self.conf.with_name("gres.conf").write_text(f"AutoDetect=off\nName=gpu File={devices}\n")
        self.hosts.environment["SLURM_CONF"] = str(self.conf)
        self._start_munged()
        self.hosts.run(CONTROLLER, ["slurmctld"])
        self.hosts.on_boot.append(self._start_slurmd)
        for host in self.hosts.names:
            self._start_slurmd(host)
        self.wait_idle(*self.hosts.names)
        return self

    def wait_idle(self, *hosts: str, seconds: float = 30.0) -> None:
        """Waits until the named hosts, or all of them, are idle."""
        deadline = time.monotonic() + seconds
        while (states := self.states(*hosts)) != dict.fromkeys(hosts or self.hosts.names, "idle"):
            assert time.monotonic() < deadline, f"{states} after {seconds} s\n{self.logs()}"
            time.sleep(0.1)

    def states(self, *hosts: str) -> dict[str, str]:
        """The state of each host according to sinfo."""
        listed = self.hosts.run(CONTROLLER, ["sinfo", "--noheader", "--Node", "--format=%N %T"]).stdout
        states = dict(line.split() for line in listed.splitlines())
        return {host: states[host] for host in hosts or self.hosts.names}

    def _devices(self) -> str:
        """Files in place of GPU devices."""
        for index in range(GPUS_OF_HOST):
            (self._own / f"gpu{index}").touch()
        return f"{self._own}/gpu[0-{GPUS_OF_HOST - 1}]"

    def _start_munged(self) -> None:
        key = self._own / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for host in (CONTROLLER, *self.hosts.names):
            self._bind_munge(host)
        self.hosts.on_boot.append(self._bind_munge)
        files = [
            f"--{name}-file=/run/munge/munge{end}" for name, end in (("key", ".key"), ("log", ".log"), ("pid", ".pid"))
        ]
        self.hosts.run(
            CONTROLLER, ["munged", "--force", *files, "--seed-file=/run/munge/munge.seed", "--socket=" + _SOCKET]
        )

    def _bind_munge(self, host: str) -> None:
        """One munged serves all hosts; its socket is mounted where each host expects one."""
        self.hosts.run(host, ["mkdir", "/run/munge"])
        self.hosts.run(host, ["mount", "--bind", str(self._own / "munge"), "/run/munge"])

    def _start_slurmd(self, host: str) -> None:
        (self.hosts.folder / host / "spool").mkdir(exist_ok=True)
        self.hosts.run(host, ["slurmd", "-N", host])

    def _configuration(self) -> str:
        own, hosts = self._own, self.hosts
        settings = {
            "ClusterName": "testbed",
            "SlurmctldHost": f"{CONTROLLER}({hosts.address(CONTROLLER)})",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "StateSaveLocation": own / "state",
            "SlurmctldPidFile": own / "slurmctld.pid",
            "SlurmctldLogFile": own / "slurmctld.log",
            "SlurmdSpoolDir": f"{hosts.folder}/%n/spool",
            "SlurmdPidFile": f"{hosts.folder}/%n/slurmd.pid",
            "SlurmdLogFile": f"{hosts.folder}/%n/slurmd.log",
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1",
            "ReturnToService": 2,
            "SlurmdTimeout": 30,
            # Slurm's own default.
            "KillWait": 30,
            "MinJobAge": 300,
            "JobRequeue": 1,
            "GresTypes": "gpu",
        }
        nodes = [
            f"NodeName={host} NodeAddr={hosts.address(host)} CPUs={CPUS_OF_HOST} RealMemory=16000"
            f" Gres=gpu:{GPUS_OF_HOST} State=UNKNOWN"
            for host in hosts.names
        ]
        partition = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        return "\n".join([*(f"{key}={value}" for key, value in settings.items()), *nodes, partition, ""])

    def logs(self) -> str:
        """The ends of the logs of Slurm's own processes."""
        logs = [*self._own.glob("*.log"), *self.hosts.folder.glob("*/slurmd.log")]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs)
