"""A script as a rank: for its agent a process like any other, and it never outlives the agent."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.fleet.process import RankProcess, signals_blocked, stop_all
from launcher.fleet.run_script import fill_placeholders, torchrun_variables
from launcher.run_dir import RunDir
from launcher.runs.script_supervisor import RUN_SCRIPT
from tests.time_limit import TIME_LIMIT_SECONDS

RANK = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
RANK |= {"LAUNCHER_RUN_DIR": "/runs/mine-1"}
Start = Callable[..., RankProcess]


class Reports:
    """What an agent receives from one rank."""

    def __init__(self) -> None:
        self._reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self.put = self._reports.put

    def wait_for(self, kind: str) -> dict[str, Any]:
        while True:
            report = self._reports.get(timeout=TIME_LIMIT_SECONDS)
            if report["report"] == kind:
                return report


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def start(tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a script as an agent does. The script is written to tmp_path."""
    started: list[RankProcess] = []

    def begin(
        script: str, *arguments: str, runner: Sequence[str] = RUN_SCRIPT, cwd: str | None = None, **variables: str
    ) -> RankProcess:
        (tmp_path / "train.py").write_text(script)
        if cwd is not None:
            monkeypatch.chdir(cwd)
        environment = {**os.environ, **RANK, "PYTHONUNBUFFERED": "1", **variables}
        command = [sys.executable, *runner, str(tmp_path), "train.py", *arguments]
        started.append(RankProcess(5, command, environment, tmp_path / "rank.log", reports.put))
        return started[-1]

    yield begin
    stop_all(started, 0.0)


def wait_for_line(tmp_path: Path, word: str) -> str:
    """The first line of the log that contains the word."""
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while time.monotonic() < deadline:
        lines = (tmp_path / "rank.log").read_text().splitlines() if (tmp_path / "rank.log").exists() else []
        if found := [line for line in lines if word in line]:
            return found[0].split(" ", 1)[1]
        time.sleep(0.02)
    raise AssertionError(f"no line with {word}")


def group_of(pid: int) -> list[int]:
    """The running processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while group_of(pid):
        assert time.monotonic() < deadline, f"still there: {group_of(pid)}"
        time.sleep(0.02)


def test_the_script_is_the_process_that_the_agent_started(start: Start, reports: Reports, tmp_path: Path) -> None:
    script = """
import json, os, sys
try:
    os.wait()
    children = True
except ChildProcessError:
    children = False
seen = {name: os.environ[name] for name in ("RANK", "ROLE_RANK", "GROUP_WORLD_SIZE", "LOCAL_SIZE")}
print(json.dumps([os.getpid(), os.getcwd(), sys.argv[1:], sys.path[0], sys.stdin.read(), children, seen]))
sys.exit(7)
"""
    process = start(script, "--local_rank={local_rank}", "{rank}", "{other}")
    assert reports.wait_for("exit")["code"] == 7
    seen = {"RANK": "5", "ROLE_RANK": "5", "GROUP_WORLD_SIZE": "2", "LOCAL_SIZE": "4"}
    folder = str(tmp_path)
    wanted = [process.pid, folder, ["--local_rank=1", "5", "{other}"], folder, "", False, seen]
    assert json.loads(wait_for_line(tmp_path, "[")) == wanted
    wait_until_gone(process.pid)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_reported_as_that_signal(start: Start, reports: Reports, number: signal.Signals) -> None:
    start(f"import os; os.kill(os.getpid(), {int(number)})")
    assert reports.wait_for("exit")["code"] == -number


def test_a_module_is_run_as_python_runs_it(reports: Reports, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/train.py").write_text("import sys; print(sys.argv[1:], __package__); sys.exit(3)")
    command = [sys.executable, *RUN_SCRIPT, str(tmp_path), "-m", "package.train", "--steps", "2"]
    RankProcess(5, command, {**os.environ, **RANK}, tmp_path / "rank.log", reports.put)
    assert reports.wait_for("exit")["code"] == 3
    assert wait_for_line(tmp_path, "steps") == "['--steps', '2'] package"


STUBBORN = """
import signal, time
received = []
signal.signal(signal.SIGTERM, lambda *_: (received.append(1), print(f"SIGTERM {len(received)}")))
print("ready")
while True:
    time.sleep(0.05)
"""


def test_the_order_to_stop_sends_one_sigterm_and_later_sigkill(start: Start, reports: Reports, tmp_path: Path) -> None:
    quick = "import sys, launcher.fleet.run_script as runner; runner.STOP_GRACE_SECONDS = 3; runner.main()"
    process = start(STUBBORN, runner=("-c", quick))
    wait_for_line(tmp_path, "ready")
    process.order({"go": {"env": {}}})
    process.order({"stop": True})
    process.order({"stop": True})
    assert reports.wait_for("exit")["code"] == -signal.SIGKILL
    assert (tmp_path / "rank.log").read_text().count("SIGTERM") == 1
    wait_until_gone(process.pid)


def test_a_script_may_save_and_exit_at_the_order_to_stop(start: Start, reports: Reports, tmp_path: Path) -> None:
    saving = """
import signal, sys, time
def save(*_):
    time.sleep(0.2); print("saved"); sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready")
time.sleep(3600)
"""
    process = start(saving)
    wait_for_line(tmp_path, "ready")
    process.order({"stop": True})
    assert reports.wait_for("exit")["code"] == 0
    wait_for_line(tmp_path, "saved")


WARNED = """
import signal, sys, time
if sys.argv[1] == "handles":
    signal.signal(signal.SIGUSR1, lambda *_: print("received", flush=True))
print("ready")
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("script", ["handles", "does not"])
def test_a_script_may_handle_a_signal_that_its_agent_blocks_and_is_not_ended_by_it(
    start: Start, reports: Reports, tmp_path: Path, script: str
) -> None:
    with signals_blocked(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process = start(WARNED, script)
    wait_for_line(tmp_path, "ready")
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGUSR1)
    if script == "handles":
        wait_for_line(tmp_path, "received")
    process.order({"stop": True})
    assert reports.wait_for("exit")["code"] == -signal.SIGTERM


AGENT = """
import os, sys, time
from pathlib import Path
from launcher.fleet.process import RankProcess
process = RankProcess(5, sys.argv[1:], dict(os.environ), Path("rank.log"), lambda report: None)
print(process.pid, flush=True)
time.sleep(3600)
"""


def test_when_the_agent_is_gone_the_script_and_its_children_end(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    (tmp_path / "train.py").write_text(f"""
import subprocess, sys
{STUBBORN.replace('print("ready")', f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('ready')")}
""")
    command = [sys.executable, *RUN_SCRIPT, str(tmp_path), "train.py"]
    environment = {**os.environ, **RANK, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, *command], stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        wait_for_line(tmp_path, "ready")
        assert len(group_of(pid)) == 3  # the script, its own process, and the watcher
        agent.kill()
    wait_until_gone(pid)


def test_the_agent_kills_a_script_after_the_grace_time(start: Start, reports: Reports, tmp_path: Path) -> None:
    process = start(STUBBORN)
    wait_for_line(tmp_path, "ready")
    stop_all([process], grace_seconds=3.0)
    assert reports.wait_for("exit")["code"] == -signal.SIGKILL
    assert (tmp_path / "rank.log").read_text().count("SIGTERM") == 1
    wait_until_gone(process.pid)


def test_a_script_reports_to_its_agent_and_writes_the_metrics_on_rank_0(
    start: Start, reports: Reports, tmp_path: Path
) -> None:
    script = """
import launcher
launcher.report(step=0, loss=2.5, lr=1e-3)
launcher.report(step=4, loss=float("nan"), lr=2e-3, tokens=100, accuracy=0.5)
"""
    start(script, LAUNCHER_RUN_DIR=str(tmp_path), LAUNCHER_TRAIN_BATCH_SIZE="8", RANK="0")
    first, second = reports.wait_for("update"), reports.wait_for("update")
    assert reports.wait_for("exit")["code"] == 0
    assert (first["update"], first["step_seconds"], second["update"]) == (0, None, 4)
    lines = RunDir(tmp_path).metrics()
    measured = {"time", "peak_memory_bytes"}
    assert [{k: v for k, v in line.items() if k not in measured} for line in lines] == [
        {"update": 0, "samples": 8, "loss": 2.5, "lr": 1e-3},
        {
            "update": 4,
            "samples": 40,
            "loss": "nan",
            "lr": 2e-3,
            "tokens": 100,
            "accuracy": 0.5,
            "step_seconds": lines[1]["step_seconds"],
            "tokens_per_second": lines[1]["tokens_per_second"],
        },
    ]
    assert lines[1]["step_seconds"] == pytest.approx(second["step_seconds"], abs=1e-6)
    assert lines[1]["tokens_per_second"] == pytest.approx(100 / second["step_seconds"], abs=0.1)


def test_other_ranks_report_and_do_not_write(start: Start, reports: Reports, tmp_path: Path) -> None:
    start("import launcher; launcher.report(step=3, loss=1.0)", LAUNCHER_RUN_DIR=str(tmp_path))
    assert reports.wait_for("update")["update"] == 3
    assert reports.wait_for("exit")["code"] == 0
    assert RunDir(tmp_path).metrics() == []


def test_modules_in_the_scripts_folder_are_only_for_the_script(start: Start, reports: Reports, tmp_path: Path) -> None:
    """A launcher.py there is what the script imports, but does not replace the launcher itself."""
    (tmp_path / "launcher.py").write_text("print('the launcher of the script')")
    process = start("import launcher, sys; sys.exit(3)", LAUNCHER_RUN_DIR=str(tmp_path), cwd=str(tmp_path))
    assert reports.wait_for("exit")["code"] == 3, process
    wait_for_line(tmp_path, "the launcher of the script")


def test_a_child_of_the_script_does_not_write_to_another_file_with_the_pipes_number(
    start: Start, reports: Reports, tmp_path: Path
) -> None:
    child = """
import os, sys, launcher
number, file = int(os.environ["LAUNCHER_REPORT_FD"]), os.open("child", os.O_RDWR | os.O_CREAT)
os.dup2(file, number)
launcher.report(step=7, loss=1.0)
reading, writing = os.pipe()
os.dup2(writing, number)
launcher.report(step=8, loss=1.0)
os.set_blocking(reading, False)
try:
    print("child wrote", os.read(reading, 100))
except BlockingIOError:
    print("child wrote nothing")
"""
    script = f"""
import os, subprocess, sys, launcher
subprocess.run([sys.executable, "-c", {child!r}], check=True)
launcher.report(step=0, loss=2.0)
file = os.open("own", os.O_RDWR | os.O_CREAT)
os.dup2(file, int(os.environ["LAUNCHER_REPORT_FD"]))
launcher.report(step=1, loss=2.0)
"""
    start(script, LAUNCHER_RUN_DIR=str(tmp_path))
    assert reports.wait_for("update")["update"] == 0
    assert reports.wait_for("exit")["code"] == 0, (tmp_path / "rank.log").read_text()
    wait_for_line(tmp_path, "child wrote nothing")
    assert (tmp_path / "child").read_text() == (tmp_path / "own").read_text() == ""


@pytest.fixture
def sigterm_blocked() -> Iterator[None]:
    """As in an agent under Slurm: Slurm sends SIGTERM to every process of a task at once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@pytest.mark.usefixtures("sigterm_blocked")
def test_a_script_receives_sigterm_though_its_agent_blocks_it(start: Start, reports: Reports) -> None:
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert reports.wait_for("exit")["code"] == -signal.SIGTERM, process


@pytest.mark.usefixtures("sigterm_blocked")
def test_a_rank_that_blocks_sigterm_is_killed_at_once(reports: Reports, tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True); input()"
    process = RankProcess(5, [sys.executable, "-c", code], os.environ, tmp_path / "rank.log", reports.put)
    wait_for_line(tmp_path, "still here")
    stop_all([process], 3600.0)
    assert reports.wait_for("exit")["code"] == -signal.SIGKILL


def test_variables_of_torchrun_and_deepspeed() -> None:
    found = torchrun_variables({**RANK, "RANK": "7"})
    assert found == {
        "ROLE_RANK": "7",
        "ROLE_WORLD_SIZE": "8",
        "ROLE_NAME": "default",
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_SIZE": "4",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "mine-1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def test_unknown_placeholders_stay() -> None:
    given = ['{"a": {rank}}', "{local_rank}{rank}", "{}", "{RANK}"]
    assert fill_placeholders(given, RANK) == ['{"a": 5}', "15", "{}", "{RANK}"]
