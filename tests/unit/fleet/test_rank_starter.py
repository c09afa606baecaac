"""Which process an agent's ranks are forked from, and when they are fresh processes."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from launcher.files import output_mode
from launcher.fleet import rank_starter
from launcher.fleet.agent import Agent, NodeTask
from launcher.fleet.environment import inherited_environment
from launcher.fleet.forks import SERVER_VARIABLE, OwnForkServer
from tests.time_limit import TIME_LIMIT_SECONDS

RANK = """
    import os, sys
    print("attempt", os.environ["LAUNCHER_ATTEMPT"], "of", os.getppid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _light_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers import nothing."""
    monkeypatch.setattr(rank_starter, "OwnForkServer", partial(OwnForkServer, modules=("json",)))


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.end(0.0)
    agent._starter.close()


@pytest.fixture
def task(tmp_path: Path) -> NodeTask:
    """Two ranks that wait for the end of their orders."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "rank.py").write_text(textwrap.dedent(RANK))
    return NodeTask(
        node_rank=0,
        first_rank=0,
        processes=2,
        world_size=2,
        run_dir=str(tmp_path),
        log_folder=str(tmp_path / "node-0-h0"),
        # pytest gives the variable another value in each phase of a test.
        environment={"PYTHONPATH": str(tmp_path / "modules"), "PYTEST_CURRENT_TEST": ""},
        arguments=("-P", "-m", "rank"),
        forked=True,
    )


@pytest.fixture
def offered(task: NodeTask, tmp_path: Path) -> Iterator[OwnForkServer]:
    """A server that somebody else has started with the environment of the ranks."""
    server = OwnForkServer({**inherited_environment(), **task.environment}, tmp_path / "imports.log", ("json",))
    yield server
    server.close()


def parents(agent: Agent, task: NodeTask) -> set[int]:
    """The parents of the ranks that an agent starts, once both run."""
    pids = agent.start(task)
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    logs = [Path(task.log_folder, name) for name in rank_logs(task)]
    while not all(log.exists() and b" of " in log.read_bytes() for log in logs):
        assert time.monotonic() < deadline, agent_log(task)
        time.sleep(0.01)
    return {psutil.Process(pid).ppid() for pid in pids}


def rank_logs(task: NodeTask) -> list[str]:
    return [f"rank-{rank}.log" if task.attempt == 1 else f"rank-{rank}.attempt-{task.attempt}.log" for rank in (0, 1)]


def agent_log(task: NodeTask) -> str:
    return Path(task.log_folder, "agent.log").read_text()


def own_server() -> int:
    """The only fork server that this process has started."""
    (server,) = psutil.Process().children()
    return server.pid


def test_an_agent_starts_a_server_and_keeps_it_for_restarts(agent: Agent, task: NodeTask) -> None:
    agent.prepare_forks(task, None)
    server = own_server()
    assert parents(agent, task) == {server}
    agent.end(TIME_LIMIT_SECONDS)
    agent.prepare_forks(task, None)
    assert parents(agent, replace(task, attempt=2)) == {server}
    assert "fresh" not in agent_log(task)


def test_forks_and_their_logs_have_the_output_mode(agent: Agent, task: NodeTask) -> None:
    task = replace(task, output_mode="group")
    with output_mode("private"):
        agent.prepare_forks(task, None)
        assert parents(agent, task) == {own_server()}
    ranks = psutil.Process(own_server()).children()
    umasks = {Path(f"/proc/{rank.pid}/status").read_text().partition("Umask:\t")[2].split()[0] for rank in ranks}
    assert umasks == {"0027"}
    folder = Path(task.log_folder)
    assert {path.name: oct(path.stat().st_mode)[-3:] for path in (folder, *folder.glob("*.log"))} == {
        "node-0-h0": "750",
        **dict.fromkeys(["agent.log", "imports.log", *rank_logs(task)], "640"),
    }


@pytest.mark.parametrize("name", ["is not here", "is not a run directory"])
def test_a_node_that_cannot_use_the_run_directory_is_left_to_its_check(
    name: str, agent: Agent, task: NodeTask, tmp_path: Path
) -> None:
    """The check reports it with a hint; no folder is created where only this node sees it."""
    (tmp_path / "is not a run directory").mkdir()
    (tmp_path / "is not a run directory" / "logs").touch()
    folder = tmp_path / name
    agent.prepare_forks(replace(task, run_dir=str(folder), log_folder=str(folder / "logs" / "node-0-h0")), None)
    assert not (folder / "logs").is_dir() and psutil.Process().children() == []


def test_a_server_that_has_ended_is_replaced_at_the_next_attempt(agent: Agent, task: NodeTask) -> None:
    agent.prepare_forks(task, None)
    server = own_server()
    assert parents(agent, task) == {server}
    psutil.Process(server).kill()
    found: list[int] = []
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while len(found) < 2:
        assert time.monotonic() < deadline
        found += [report["code"] for report in agent.next_reports(1.0) if report["report"] == "exit"]
    assert found == [-9, -9]
    agent.prepare_forks(task, None)
    assert own_server() != server
    assert parents(agent, replace(task, attempt=2)) == {own_server()}


def test_a_server_that_ends_before_the_ranks_start_leaves_fresh_processes(agent: Agent, task: NodeTask) -> None:
    agent.prepare_forks(task, None)
    psutil.Process(own_server()).kill()
    assert parents(agent, task) == {os.getpid()}
    assert agent_log(task).count("the ranks are fresh processes: the fork server ") == 1


def test_a_server_that_refuses_leaves_fresh_processes_in_every_attempt(
    agent: Agent, task: NodeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    (tmp_path / "modules" / "thread.py").write_text(thread)
    monkeypatch.setattr(rank_starter, "OwnForkServer", partial(OwnForkServer, modules=("thread",)))
    agent.prepare_forks(task, None)
    assert parents(agent, task) == {os.getpid()}
    agent.end(TIME_LIMIT_SECONDS)
    agent._starter.close()
    agent.prepare_forks(task, None)
    assert psutil.Process().children() == []
    assert parents(agent, replace(task, attempt=2)) == {os.getpid()}
    assert agent_log(task).count("the ranks are fresh processes: the imports have started threads: ") == 1


def test_an_offered_server_is_used(agent: Agent, task: NodeTask, offered: OwnForkServer) -> None:
    agent.prepare_forks(task, offered.server)
    assert parents(agent, task) == {offered.server.pid} == {own_server()}


def test_a_server_that_the_environment_names_is_used(
    agent: Agent, task: NodeTask, offered: OwnForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offered.server.write(tmp_path / "server.json")
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path / "server.json"))
    agent.prepare_forks(task, None)
    assert parents(agent, task) == {offered.server.pid}


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"name": 1}'])
def test_a_file_that_describes_no_server_is_passed_over(
    text: str | None, agent: Agent, task: NodeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "server.json").write_text(text)
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path / "server.json"))
    agent.prepare_forks(task, None)
    assert parents(agent, task) == {own_server()}


def test_an_offered_server_with_other_variables_is_not_used(
    agent: Agent, task: NodeTask, offered: OwnForkServer
) -> None:
    task = replace(task, environment={**task.environment, "OMP_NUM_THREADS": "3", "SECRET": "s3cret"})
    agent.prepare_forks(task, offered.server)
    assert offered.server.pid not in parents(agent, task)
    expected = f"fork server {offered.server.pid} is not used: other values of OMP_NUM_THREADS, SECRET"
    assert expected in agent_log(task) and "s3cret" not in agent_log(task)


def test_an_offered_server_of_another_machine_is_not_used(agent: Agent, task: NodeTask, offered: OwnForkServer) -> None:
    traits = offered.server.traits
    elsewhere = replace(offered.server, traits=replace(traits, fixed={**traits.fixed, "machine": "another"}))
    agent.prepare_forks(task, elsewhere)
    assert offered.server.pid not in parents(agent, task)
    assert "is not used: other machine" in agent_log(task)


def test_an_attempt_with_another_environment_has_another_server(agent: Agent, task: NodeTask) -> None:
    agent.prepare_forks(task, None)
    first = own_server()
    task = replace(task, environment={**task.environment, "OMP_NUM_THREADS": "3"})
    agent.prepare_forks(task, None)
    assert own_server() != first
    assert parents(agent, task) == {own_server()}


def test_without_forks_every_rank_is_a_fresh_process(agent: Agent, task: NodeTask) -> None:
    assert parents(agent, replace(task, forked=False)) == {os.getpid()}
