"""`launcher exec` on two ranks, with scripts that follow public practice, on an existing Ray."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import socket
from pathlib import Path

import psutil
import pytest
import yaml

from launcher.plan.learning_rate import planned_lrs
from launcher.plan.schema import Plan, Script
from launcher.run_dir import RunDir
from tests.local.launcher_commands import Command, run_folder, state_of
from tests.unit import inputs

pytestmark = pytest.mark.local

SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLE = Path(__file__).parents[2] / "examples/exec"
UPDATES = 12
SECRET = "known-to-the-launcher-alone"


@pytest.fixture
def execute(tmp_path, shared_ray):
    """Starts a script on two ranks in tmp_path; returns the command."""

    def start(script: str, *arguments: str, env: dict[str, str] | None = None) -> Command:
        job = {
            "name": "mine",
            "train": {"max_steps": UPDATES, "train_micro_batch_size_per_gpu": 2},
            "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 3},
            "cluster": {"gpus_per_node": 0, "processes_per_node": 2, "env": env or {}},
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        shutil.copy(SCRIPTS / script, tmp_path)
        named = ["-m", Path(script).stem] if script == "plain_ddp.py" else [script]
        own = {**shared_ray, "WANDB_API_KEY": SECRET}
        return Command("exec", "job.yaml", "--", *named, *arguments, folder=tmp_path, **own)

    return start


def finished(command: Command, tmp_path: Path) -> tuple[RunDir, Plan]:
    """The run of a command that ended well, and its plan."""
    assert command.wait() == 0, command.output
    run = RunDir(run_folder(tmp_path))
    assert run.state()["state"] == "finished"
    assert "Traceback" not in command.output
    plan = Plan.from_json(run.plan_file.read_text())
    assert isinstance(plan.workload, Script)
    assert json.loads(run.ds_config_file.read_text()) == plan.ds_config
    return run, plan


def rank_log(run: RunDir, rank: int) -> str:
    return (run.node_logs(0, socket.gethostname()) / f"rank-{rank}.log").read_text()


def processes_in(folder: Path) -> list[str]:
    """The processes whose working directory is `folder`, such as ranks of its scripts."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_a_trainer_logs_the_planned_learning_rates(execute, tmp_path):
    command = execute(
        *("hf_trainer.py", "--output_dir", "{run_dir}/out", "--deepspeed", "{ds_config}", "{trainer_args}"),
        *("--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"),
    )
    run, plan = finished(command, tmp_path)
    state = json.loads((run.path / "out/trainer_state.json").read_text())
    logged = {line["step"]: line["learning_rate"] for line in state["log_history"] if "learning_rate" in line}
    rate = planned_lrs(plan)
    # What a Trainer logs after step n is the rate of the update that comes next, whose number from 0 is n.
    assert logged == {step: rate(step) for step in range(1, UPDATES + 1)}
    assert max(logged.values()) == 1e-3
    assert state["global_step"] == UPDATES
    events = [event["state"] for event in run.events() if event["event"] == "state"]
    assert events == ["planning", "placing", "starting", "training", "finished"]


def test_an_accelerate_script_takes_optimizer_and_schedule_from_the_deepspeed_json(execute, tmp_path):
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "{ds_config}"}
    command = execute(
        *("accelerate_loop.py", "--learning_rate", "{learning_rate}", "--max_train_steps", "{max_steps}"),
        *("--per_device_train_batch_size", "{per_device_train_batch_size}"),
        env=env,
    )
    run, plan = finished(command, tmp_path)
    log, rate = rank_log(run, 0), planned_lrs(plan)
    assert "prepared: DEEPSPEED, 2 processes" in log
    made = [float(found) for found in re.findall(r" lr (\S+) loss ", log)]
    assert made == [rate(update) for update in range(UPDATES)]


def test_the_example_of_a_plain_deepspeed_script_reports_the_planned_learning_rates(shared_ray, tmp_path):
    for file in EXAMPLE.iterdir():
        shutil.copy(file, tmp_path)
    command = Command(
        *("exec", "job.yaml", "--", "train.py", "--deepspeed", "--deepspeed_config", "{ds_config}"),
        *("--steps", "{max_steps}", "--local_rank", "{local_rank}"),
        folder=tmp_path,
        **shared_ray,
    )
    run, plan = finished(command, tmp_path)
    updates = plan.length.total_updates
    assert f"finished after {updates} updates" in command.output
    rate, lines = planned_lrs(plan), run.metrics()
    assert [(line["update"], line["lr"]) for line in lines] == [(update, rate(update)) for update in range(updates)]
    assert [line["samples"] for line in lines] == [8 * (update + 1) for update in range(updates)]
    losses = [line["loss"] for line in lines]
    assert all(line["grad_norm"] > 0 for line in lines) and sum(losses[-5:]) < sum(losses[:5])
    assert "other_rate" not in {event["event"] for event in run.events()}
    for rank in (0, 1):
        assert f"local rank {rank} of 2, micro-batch 4" in rank_log(run, rank)
    node = json.loads((run.node_logs(0, socket.gethostname()) / "node.json").read_text())
    assert [(rank["updates"], rank["exit_code"]) for rank in node["ranks"]] == [(updates, 0), (updates, 0)]
    shown = inputs.command("lr", str(run.path)).out
    made = f"{updates} of {updates} updates were made, all at exactly the planned learning rate"
    assert made in " ".join(shown.split())


def test_a_plain_pytorch_module_has_torchruns_variables_and_its_other_learning_rate_is_reported(execute, tmp_path):
    run, _ = finished(execute("plain_ddp.py", "--report"), tmp_path)
    for rank in (0, 1):
        log = rank_log(run, rank)
        assert "the ranks agree" in log and "launched by torchelastic: True, 0 restarts" in log
        environment = ast.literal_eval(log[log.index("{") : log.index("}") + 1])
        assert environment.pop("MASTER_ADDR") == "127.0.0.1" and int(environment.pop("MASTER_PORT")) > 1024
        assert environment == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "NODE_RANK": "0",
            "LAUNCHER_DS_CONFIG": str(run.ds_config_file),
        }
        assert f"a secret of {len(SECRET)} characters" in log
    written = [file.read_bytes() for file in run.path.rglob("*") if file.is_file()]
    assert len(written) > 5 and not any(SECRET.encode() in content for content in written)
    told = [event for event in run.events() if event["event"] == "other_rate"]
    assert [(event["update"], event["lr"]) for event in told] == [(0, 0.05)]


def test_the_rank_that_raises_is_named_though_its_peer_ends_first(execute, tmp_path):
    command = execute("plain_ddp.py", "--raise-on-rank", "1")
    assert command.wait() == 1
    assert "rank 1 on node 0" in command.output and "a worn-out example" in command.output
    run = RunDir(run_folder(tmp_path))
    (failure,) = [event for event in run.events() if event["event"] == "failure"]
    assert (failure["rank"], failure["how"], failure["error"]) == (1, "exit code 1", "RuntimeError: a worn-out example")
    assert [(each["rank"], "worn-out" in each["traceback"]) for each in failure["failures"]] == [(1, True), (0, False)]
    agent = (run.node_logs(0, socket.gethostname()) / "agent.log").read_text()
    # The peer ends with an exception, or torch aborts it first.
    assert re.findall(r"rank (\d) ended with", agent) == ["0", "1"] and "rank 1 ended with 1" in agent
    state = run.state()
    assert state["state"] == "failed" and "RuntimeError: a worn-out example" in state["reason"]
    why = inputs.command("why", str(run.path)).out
    assert re.match(r"rank 1 on node 0 \(\S+\) failed first, with exit code 1: RuntimeError: a worn-out example", why)
    status = json.loads(inputs.command("status", "--json", str(run.path)).out)
    assert status["state"] == "failed" and 1 in status["nodes"][0]["exit_codes"]
    assert processes_in(tmp_path) == []


def test_ctrl_c_sends_the_script_sigterm(execute, tmp_path):
    # Only the script may import these files.
    for module in ("launcher", "datasets", "deepspeed"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('a file of the user')")
    command = execute("sleeper.py")

    def at_work() -> bool:
        folder = run_folder(tmp_path)
        logs = list(folder.glob("logs/node-0-*/rank-*.log")) if folder else []
        return len(logs) == 2 and all("at work" in log.read_text() for log in logs)

    def shown() -> bool:
        status = json.loads(inputs.command("status", "--json", str(run_folder(tmp_path))).out)
        nodes = [(node["ranks"], node["ranks_alive"]) for node in status["nodes"]]
        return (status["state"], nodes) == ("training", [([0, 1], 2)])

    command.wait_for(at_work)
    command.wait_for(shown)
    run = run_folder(tmp_path)
    assert "the run is still active: training" in inputs.command("why", str(run)).out
    command.interrupt()
    assert command.wait() == 128 + signal.SIGINT, command.output
    assert "sending SIGTERM to the script" in command.output and "stopped" in command.output
    assert state_of(tmp_path)["state"] == "stopped"
    assert "no failure: the run was stopped" in inputs.command("why", str(run)).out
    agent = (RunDir(run_folder(tmp_path)).node_logs(0, socket.gethostname()) / "agent.log").read_text()
    for rank in (0, 1):
        assert f"rank {rank} ended with -{int(signal.SIGTERM)}" in agent
    assert processes_in(tmp_path) == []
