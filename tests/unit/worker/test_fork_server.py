"""A fork server with light imports: its forks are as fresh processes, and end with it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.fleet.forks import ForkServer, NotForkedError, OwnForkServer, ServerUnavailableError
from launcher.fleet.process import Child, start_process
from launcher.worker import fork_server
from tests.time_limit import TIME_LIMIT_SECONDS

PROBE = """
    import gc, json, os, resource, signal, sys
    from pathlib import Path

    def kind(fd):
        try:
            return fd.readlink().as_posix().partition(":")[0]
        except OSError:
            return None

    streams = sorted(kind(fd) for fd in Path("/proc/self/fd").iterdir() if kind(fd) is not None)
    status = Path("/proc/self/status").read_text()
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    found = {
        "arguments": sys.argv,
        "path": sys.path,
        "flags": str(sys.flags),
        "name": __name__,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "limits": limits,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "status": [line for line in status.splitlines() if line.startswith(("Umask", "Sig", "Threads", "Uid"))],
        "collector": [gc.isenabled(), gc.get_threshold()],
        "leads its session": os.getsid(0) == os.getpid(),
        "descriptors": streams,
        "input": sys.stdin.readline(),
    }
    os.write(int(os.environ["REPORT"]), b"reported")
    print(json.dumps(found))
    sys.exit(7)
"""
WAITS = "import sys; print('runs', flush=True); sys.stdin.read()"
RANDOM = """
    import random, sys
    import numpy
    print(random.random(), numpy.random.rand())
"""

SCRIPT = """
    import atexit, json, os, sys, threading, time
    from pathlib import Path

    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    names = ("RANK", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")
    print(json.dumps([sys.argv, sys.path, __name__, os.getcwd(), {name: os.environ[name] for name in names}]))
    print(Path(__file__).name, Path("/proc/self/fd/0").readlink())
    sys.exit(int(sys.argv[-1]))
"""
TORCH = "class cuda:\n    _is_in_bad_fork = staticmethod(lambda: False)\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a server and of its forks, with a folder of modules on the path."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in {"probe": PROBE, "waits": WAITS, "random_numbers": RANDOM}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture
def own(environment: dict[str, str], tmp_path: Path) -> Iterator[OwnForkServer]:
    server = OwnForkServer(environment, tmp_path / "imports.log", ("json", "numpy"))
    yield server
    server.close()


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def ended(process: psutil.Process) -> bool:
    psutil.wait_procs([process], timeout=TIME_LIMIT_SECONDS)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def probed(start: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the probe finds in a process that `start` starts."""
    report_in, report_out = os.pipe()
    child: Child = start(command("probe", "an argument"), {**environment, "RANK": "3"}, {"REPORT": report_out})
    os.close(report_out)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"an order\n")
    child.stdin.close()
    output = child.stdout.read()
    assert child.wait(TIME_LIMIT_SECONDS) == 7, output
    with os.fdopen(report_in, "rb") as reports:
        assert reports.read() == b"reported"
    found = json.loads(output)
    found["environment"].pop("REPORT")
    return dict(found)


def test_a_fork_is_as_a_fresh_process(own: OwnForkServer, environment: dict[str, str]) -> None:
    """Also where the process that asks has other settings than the server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    folder, umask = Path.cwd(), os.umask(0o027)
    os.chdir("/")
    try:
        fresh = probed(start_process, environment)
        forked = probed(own.server.fork, environment)
    finally:
        os.chdir(folder)
        os.umask(umask)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert forked == fresh
    assert fresh["environment"]["RANK"] == "3" and fresh["leads its session"] and fresh["input"] == "an order\n"


def test_a_fork_is_nice_if_the_process_that_asks_is(environment: dict[str, str], tmp_path: Path) -> None:
    """As Ray's agents are, but not the launcher, which starts the server."""
    asks = (
        "import os, sys; from pathlib import Path; from launcher.fleet.forks import ForkServer; os.nice(5); "
        "server = ForkServer.read(Path(sys.argv[1])); assert server.unlike(os.environ) is None; "
        "child = server.fork([sys.executable, '-P', '-m', 'waits'], os.environ, {}); "
        "print(os.getpriority(os.PRIO_PROCESS, child.pid)); child.stdin.close(); print(child.wait())"
    )
    own = OwnForkServer(environment, tmp_path / "imports.log", ("json",))
    try:
        own.server.write(tmp_path / "server.json")
        done = subprocess.run(
            [sys.executable, "-c", asks, str(tmp_path / "server.json")], env=environment, capture_output=True, text=True
        )
    finally:
        own.close()
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    assert done.stdout.split() == [str(niceness + 5), "0"], done.stderr


@pytest.mark.parametrize("command_line", [["script.py", "of {rank}", "3"], ["-m", "script", "{local_rank}", "0"]])
def test_a_forked_script_is_run_as_python_runs_it(
    command_line: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """With the libraries of the server, so in the forked process itself."""
    (tmp_path / "modules" / "torch.py").write_text(TORCH)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    given = {**environment, **ranks, "LAUNCHER_RUN_DIR": str(tmp_path / "a-run")}
    words = [*command("launcher.fleet.run_script"), str(tmp_path), *command_line]
    found = []
    own = OwnForkServer(environment, tmp_path / "log", ("torch",))
    try:
        for start in (start_process, own.server.fork):
            child = start(words, given, {})
            code = child.wait(TIME_LIMIT_SECONDS)
            # The watcher of the script waits for the agent, which ends it so.
            os.killpg(child.pid, signal.SIGKILL)
            assert child.stdout is not None
            found.append((sorted(child.stdout.read().splitlines()), code))
    finally:
        own.close()
    fresh, forked = found
    assert forked == fresh and fresh[1] == int(command_line[-1]) and b"at exit" in fresh[0] and b"thread" in fresh[0]


def test_each_fork_has_its_own_random_numbers(own: OwnForkServer, environment: dict[str, str]) -> None:
    children = [own.server.fork(command("random_numbers"), environment, {}) for _ in range(2)]
    first, second = (child.stdout.read().split() for child in children)
    assert len(first) == 2 and first[0] != second[0] and first[1] != second[1]


def test_the_command_line_of_a_fork_names_its_rank(own: OwnForkServer, environment: dict[str, str]) -> None:
    child = own.server.fork(command("waits"), {**environment, "RANK": "5"}, {})
    assert psutil.Process(child.pid).cmdline() == [*command("waits"), "rank", "5"]
    assert psutil.Process(own.server.pid).cmdline()[-1] == "launcher.worker.fork_server"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_signal_that_ends_a_fork_is_its_exit_status(
    own: OwnForkServer, environment: dict[str, str], number: int
) -> None:
    child = own.server.fork(command("waits"), environment, {})
    assert child.stdout.readline() == b"runs\n" and child.poll() is None
    os.killpg(child.pid, number)
    assert child.wait(TIME_LIMIT_SECONDS) == child.poll() == -number
    assert psutil.Process(own.server.pid).children() == []


def test_forks_end_with_the_server(own: OwnForkServer, environment: dict[str, str]) -> None:
    child = own.server.fork(command("waits"), environment, {})
    os.kill(own.server.pid, signal.SIGKILL)
    assert child.wait(TIME_LIMIT_SECONDS) == -signal.SIGKILL
    own.wait()
    with pytest.raises(ServerUnavailableError):
        own.server.fork(command("waits"), environment, {})
    assert own.server.ended()


def test_the_server_and_its_forks_end_with_the_process_that_started_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    owns = (
        "import os, sys; from pathlib import Path; from launcher.fleet.forks import OwnForkServer; "
        "own = OwnForkServer(os.environ, Path(sys.argv[1]), ('json',)); "
        "child = own.server.fork([sys.executable, '-P', '-m', 'waits'], os.environ, {}); "
        "print(own.server.pid, child.pid, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", owns, str(tmp_path / "log")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    started = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(started) == 2 and all(each.is_running() for each in started)
    process.kill()
    process.communicate()
    assert all(map(ended, started))


def test_signals_of_a_job_do_not_end_the_server(own: OwnForkServer, environment: dict[str, str]) -> None:
    """Slurm sends them to every process of a job; the ranks save then."""
    own.server.fork(command("waits"), environment, {})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(own.server.pid, number)
    assert own.server.fork(command("waits"), environment, {}).poll() is None


def test_a_server_with_a_thread_does_not_fork(environment: dict[str, str], tmp_path: Path) -> None:
    own = OwnForkServer(environment, tmp_path / "log", ("starts_a_thread",))
    try:
        with pytest.raises(NotForkedError, match="the imports have started threads: python"):
            own.server.fork(command("waits"), environment, {})
    finally:
        own.close()


@pytest.mark.parametrize("declared", [False, True])
def test_a_sitecustomize_on_the_path_makes_ranks_fresh_unless_it_is_the_same_for_all(
    declared: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    """At the start of the server there is no RANK that it could read."""
    file = tmp_path / "modules" / "sitecustomize.py"
    file.write_text(f"import os\nmine = os.environ.get('RANK')\nSAME_FOR_ALL_RANKS = {declared}\n")
    own = OwnForkServer(environment, tmp_path / "log", ("json",))
    try:
        if declared:
            assert own.server.fork(command("waits"), environment, {}).poll() is None
        else:
            with pytest.raises(NotForkedError, match=r"sitecustomize\.py runs at the start of every Python"):
                own.server.fork(command("waits"), environment, {})
    finally:
        own.close()


def test_threads_of_openblas_are_ended_before_the_first_fork(environment: dict[str, str], tmp_path: Path) -> None:
    """It starts them when numpy is imported, if there are several processors and OMP_NUM_THREADS allows them."""
    own = OwnForkServer(
        {**environment, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}, tmp_path / "log", ("numpy",)
    )
    try:
        assert own.server.fork(command("waits"), environment, {}).poll() is None
    finally:
        own.close()


def test_a_server_with_an_open_device_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_DEVICES", ("/dev/zero",))
    monkeypatch.setattr(fork_server, "_threads", lambda: ["python"])
    request = {"safe_path": sys.flags.safe_path}
    assert fork_server.cannot_fork(request) is None
    with Path("/dev/zero").open("rb"):
        assert fork_server.cannot_fork(request) == "the imports have opened /dev/zero"


def test_a_server_whose_import_fails_reports_it_and_ends(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "modules" / "fails.py").write_text("raise ImportError('a library is missing')")
    own = OwnForkServer(environment, tmp_path / "log", ("fails",))
    with pytest.raises(ServerUnavailableError):
        own.server.fork(command("waits"), environment, {})
    own.close()
    assert "a library is missing" in (tmp_path / "log").read_text()


def test_a_request_of_somebody_who_no_longer_waits_starts_nothing(
    own: OwnForkServer, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.fleet.forks.READY_SECONDS", 0.05)
    os.kill(own.server.pid, signal.SIGSTOP)
    with pytest.raises(NotForkedError, match="did not answer"):
        own.server.fork(command("waits"), environment, {})
    os.kill(own.server.pid, signal.SIGCONT)
    monkeypatch.undo()
    child = own.server.fork(command("waits"), environment, {})
    assert [each.pid for each in psutil.Process(own.server.pid).children()] == [child.pid]


def test_the_file_of_a_server_is_private(own: OwnForkServer, tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    own.server.write(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert ForkServer.read(file) == own.server


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_gets_nothing(own: OwnForkServer, environment: dict[str, str]) -> None:
    asks = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]); "
        "s.sendall(b'x' * 8); print(s.recv(1))"
    )
    done = subprocess.run([sys.executable, "-c", asks, own.server.name], capture_output=True, text=True)
    assert done.stdout.strip() == "b''" or "ConnectionResetError" in done.stderr, done
    assert own.server.fork(command("waits"), environment, {}).poll() is None


def test_a_process_that_listens_for_another_user_is_not_asked(
    own: OwnForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.fleet.forks.peer_user", lambda _: os.getuid() + 1)
    with pytest.raises(ServerUnavailableError, match="a process of another user listens"):
        own.server.fork(command("waits"), {}, {})
