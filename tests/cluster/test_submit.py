"""`launcher submit` on a real Slurm: it submits what it shows, and the batch script passes signals on."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.unit.inputs import JOB, write_folder

pytestmark = pytest.mark.cluster

LAUNCHER = str(Path(sys.executable).with_name("launcher"))
TELLING = """\
#!/bin/bash
{{ directives | join("\\n") }}
printf '%s\\n' "$SLURM_ARRAY_JOB_ID" "$SLURM_NNODES" "$SLURM_CPUS_PER_TASK" "$PWD" {{ job_arguments | quote }} \\
    >"told-$SLURM_ARRAY_TASK_ID.new"
mv "told-$SLURM_ARRAY_TASK_ID.new" "told-$SLURM_ARRAY_TASK_ID"
"""
PRETENDED = """\
#!/bin/bash
if [[ $2 == --stop ]]; then
    printf '%s\\n' "$SLURM_JOB_ID" "${@:2}" >stop.new
    mv stop.new stop
    exit
fi
trap 'echo TERM >>"terms-$SLURM_NODEID"; ending=1' TERM
printf '%s\\n' "$SLURM_CPUS_PER_TASK" "$@" >"task-$SLURM_NODEID"
until [[ -e stop || $ending ]]; do sleep 0.05; done
sleep 0.3
echo "saved" >"saved-$SLURM_NODEID"
[[ $SLURM_NODEID != 0 ]] || exit 7
"""


def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.05)


def submit(slurm: Slurm, folder: Path, *arguments: str, check: bool = True) -> tuple[int, str, str]:
    done = slurm.hosts.run("ctl", [LAUNCHER, "submit", "job.yaml", *arguments], cwd=folder, check=check)
    return done.returncode, done.stdout, done.stderr


def shown(slurm: Slurm, job: str) -> str:
    return slurm.hosts.run("ctl", ["scontrol", "show", "job", job]).stdout


def ended(slurm: Slurm, job: str) -> str:
    """How the job ended, once it did."""
    until(lambda: re.search(r"JobState=(COMPLETED|FAILED|CANCELLED)", shown(slurm, job)) is not None, f"end of {job}")
    return shown(slurm, job)


@pytest.fixture
def folder(shared: Path) -> Path:
    """A job in a folder whose name needs quotes everywhere."""
    folder = shared / "50%j of 'it'"
    folder.mkdir()
    write_folder(folder, JOB + "slurm: {partition: debug, signal_seconds: 30, time: '5'}\n")
    (folder / "telling.j2").write_text(TELLING)
    return folder


def test_what_is_shown_is_what_slurm_gets(slurm: Slurm, folder: Path) -> None:
    words = (
        "cluster.nodes=2",
        "model.revision=$(hostname); 'x'",
        "slurm.template=telling.j2",
        """slurm.comment='a # "b"'""",
    )
    held = 'slurm.extra=["--hold"]'
    _, first, _ = submit(slurm, folder, *words, held, "--array=5", "--parsable")
    chained = (*words, f"--dependency=afterok:{first.strip()}", "--array=0-1%1")
    _, script, command = submit(slurm, folder, *chained, "--dry-run")
    _, second, _ = submit(slurm, folder, *chained, "--parsable")
    job = second.strip()
    assert re.fullmatch(r"\d+", job)
    assert "sbatch --parsable\n" in command
    kept = slurm.hosts.run("ctl", ["scontrol", "write", "batch_script", job, "-"]).stdout
    assert kept.rstrip("\n") == script.rstrip("\n")
    facts = shown(slurm, job)
    for words_of_slurm in (f"Dependency=afterok:{first.strip()}", "NumNodes=2", 'Comment=a # "b"', f"WorkDir={folder}"):
        assert words_of_slurm in facts

    slurm.hosts.run("ctl", ["scontrol", "release", first.strip()])
    until(lambda: all((folder / f"told-{index}").exists() for index in (5, 0, 1)), "output of the array")
    chain = (f'slurm.dependency="afterok:{first.strip()}"', 'slurm.array="0-1%1"')
    for index, array, more in ((5, first.strip(), (held, 'slurm.array="5"')), (0, job, chain), (1, job, chain)):
        told = (folder / f"told-{index}").read_text().splitlines()
        assert told == [array, "2", "4", str(folder), str(folder / "job.yaml"), *words, *more]
        assert (folder / f"runs/job-slurm-{array}_{index}.log").is_file()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("slurm.partition=nowhere", "command line: slurm.partition: Slurm did not take the job: sbatch: error: inval"),
        ("slurm.nodelist=h9", "command line: slurm.nodelist: Slurm did not take the job"),
        ("slurm.gres=gpu:99", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_told_with_the_key(slurm: Slurm, folder: Path, argument: str, says: str) -> None:
    alone = ("cluster.gpus_per_node=auto", "cluster.processes_per_node=auto") if "gres" in argument else ()
    status, out, told = submit(slurm, folder, argument, *alone, check=False)
    assert (status, out) == (2, "")
    assert says in told


def with_a_pretended_launcher(folder: Path) -> str:
    """Makes a virtual environment whose launcher records its arguments; returns the override that activates it."""
    programs = folder / "my venv/bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    (programs / "launcher").write_text(PRETENDED)
    (programs / "launcher").chmod(0o755)
    return "slurm.activate=my venv"


@pytest.mark.parametrize("signal", ["USR1 to the batch script", "scancel"])
def test_the_run_saves_when_slurm_asks_for_the_end(slurm: Slurm, folder: Path, signal: str) -> None:
    """USR1 is what Slurm sends before the time limit, here sent by hand."""
    # Where sbatch passes nothing on, srun would pass on none of what the script sets either.
    alone = 'slurm.extra=["--export=NONE"]'
    words = (with_a_pretended_launcher(folder), "cluster.nodes=2", "train.max_steps=3", alone)
    _, told, _ = submit(slurm, folder, *words)
    match = re.match(r"submitted job (\d+): (waiting|running)", told)
    assert match is not None, told
    job, log = match[1], folder / f"runs/job-slurm-{match[1]}.log"
    until(lambda: all((folder / f"task-{node}").exists() for node in (0, 1)), "task on both nodes")
    for node in (0, 1):
        assert (folder / f"task-{node}").read_text().splitlines() == ["4", "node", str(folder / "job.yaml"), *words]
    if signal == "scancel":
        slurm.hosts.run("ctl", ["scancel", job])
        facts = ended(slurm, job)
        assert "JobState=CANCELLED" in facts
        assert (folder / "terms-0").read_text().split() == ["TERM"]
    else:
        slurm.hosts.run("ctl", ["scancel", "--batch", "--signal=USR1", job])
        facts = ended(slurm, job)
        assert "ExitCode=7:0" in facts, log.read_text()
        assert (folder / "stop").read_text().splitlines() == [job, "--stop", str(folder / "job.yaml"), *words]
    until(lambda: all((folder / f"saved-{node}").exists() for node in (0, 1)), "saving")
