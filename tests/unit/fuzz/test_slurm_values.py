"""Random values of a job's slurm section, and random names of files: no script with a command of theirs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from random import Random
from typing import Any

from launcher.job import load_job
from launcher.slurm.submit import SlurmRequest, SubmitContext, read_templates, slurm_request
from tests.unit.fuzz.mutations import inputs, mutated, only_launcher_errors, value
from tests.unit.slurm.test_submit import GOOD, PUNCTUATION

LISTS = ("modules", "extra", "mail_type", "container_mounts")
BASE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name_or_path": "model"},
    "data": {"train": "train.jsonl"},
    "cluster": {"nodes": 2, "gpus_per_node": 0, "processes_per_node": 4},
}
ATTACKS = (
    *("$(touch INJECTED)", "`touch INJECTED`", ";touch INJECTED", "'; touch INJECTED; '", '"; touch INJECTED; "'),
    *("| touch INJECTED", "& touch INJECTED &", "x\ntouch INJECTED", "x\rtouch INJECTED", ">INJECTED", "${IFS}"),
    *("x\u2028touch INJECTED", "\\", "\\'", "'", '"', "#", "!", "*", "~", "%j", "x\x85touch INJECTED"),
)


def word(random: Random) -> Any:
    """A text that tries to become a command, or any other value."""
    kind = random.random()
    if kind < 0.4:
        return random.choice(("", "a", "x=", "1:")) + random.choice(ATTACKS)
    if kind < 0.7:
        return "".join(random.choice(PUNCTUATION) for _ in range(random.randint(1, 12)))
    return value(random)


def job(random: Random) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key in random.sample(sorted(GOOD), random.randint(1, 3)):
        good = random.choice(GOOD[key])
        section[key] = good if random.random() < 0.4 else [word(random)] if key in LISTS else word(random)
    if "container_mounts" in section or random.random() < 0.1:
        section["container"] = "/x.sqsh"
    changes: dict[str, Any] = {"slurm": section}
    if random.random() < 0.3:
        changes["output_dir"] = word(random)
    if random.random() < 0.2:
        changes["name"] = word(random)
    if random.random() < 0.2:
        changes["cluster"] = {**BASE["cluster"], "env": {random.choice(("A", random.choice(ATTACKS))): word(random)}}
    made = {**BASE, **changes}
    return mutated(random, made) if random.random() < 0.2 else made


def rendered(random: Random) -> tuple[Any, SlurmRequest] | None:
    """The job, the name of its file and its overrides, with the request that they make; None if they are refused."""
    data, file, overrides = job(random), "job.yaml", []
    if random.random() < 0.3:
        file = f"{str(word(random)).replace('/', '_')}.yaml"
    if random.random() < 0.3:
        overrides = [f"schedule.warmup={word(random)}"]
    if not isinstance(data, dict):
        return None
    with only_launcher_errors((data, file, overrides)):
        loaded = load_job(data)
        context = SubmitContext(Path("/home/me/my $(touch INJECTED) project"), "launcher", ("SLURM_X",))
        request = slurm_request(loaded.job, Path(file), overrides, context, read_templates(loaded.job, Path("/")))
        return (data, file, overrides), request
    return None


RUN_ALL = """
srun() { :; }
module() { :; }
source() { :; }
export -f srun module source
for script in script-*; do
    bash -n "$script" || echo "$script does not parse"
    bash "$script" </dev/null || echo "$script ends with $?"
    for found in INJECTED*; do [[ -e $found ]] && { echo "$script ran an injected command"; rm "$found"; }; done
done
"""


def test_scripts_parse_and_contain_no_command_of_a_value(tmp_path: Path) -> None:
    """Each script that is rendered runs, without srun, in a folder where an injected command would leave a file."""
    found: list[Any] = []
    for random in inputs("Slurm", 1500):
        made = rendered(random)
        if made is not None:
            given, request = made
            assert len(request.script.splitlines()) == request.script.count("\n"), given
            assert len(shlex.split(request.command())) >= 2, given
            (tmp_path / f"script-{len(found)}").write_text(request.script)
            found.append(given)
    assert len(found) > 100
    done = subprocess.run(["bash", "-c", RUN_ALL], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    faults = re.findall(r"script-(\d+) (.*)", done.stdout)
    assert not faults, [(what, found[int(number)]) for number, what in faults[:5]] + [done.stderr[-1000:]]


def test_an_injected_command_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "script-0").write_text("srun x\ntouch INJECTED\n")
    done = subprocess.run(["bash", "-c", RUN_ALL], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "script-0 ran an injected command\n"
