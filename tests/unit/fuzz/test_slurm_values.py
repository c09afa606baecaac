"""Random values in the slurm section: rejected, or one word each of a batch script without another command."""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random
from typing import Any

from launcher.job import load_job
from launcher.slurm.submit import SlurmRequest, read_templates, slurm_request
from tests.unit.fuzz.cases import TEXTS, any_value, cases, check, mutated_bytes
from tests.unit.fuzz.test_job_files import TRAINING
from tests.unit.slurm.test_submit import GOOD, HERE

MARK = "injected"
AROUND = (
    *(("$(", ")"), ("`", "`"), ("; ", ""), ("\n", "\n"), ("' ; ", " ; '"), ('" ; ', ' ; "'), ("| ", "")),
    *(("&& ", ""), ("\r", "\r"), ("\u2028", ""), ("\\\n", ""), ("${x:-$(", ")}"), ("<(", ")"), ("\x0b", "")),
)
INJECTIONS = tuple(f"{before}touch {MARK}{after}" for before, after in AROUND)
STUBS = "".join(f"{name}() {{ :; }}\n" for name in ("srun", "module", "source", "apptainer"))
"""Functions in place of the commands of a script, which get its words and do nothing."""


def value_for(rng: Random, key: str) -> Any:
    good, chance = rng.choice(GOOD[key]), rng.random()
    if chance < 0.4:
        return good
    text = rng.choice((*INJECTIONS, *TEXTS))
    if chance < 0.5 and isinstance(good, list):
        return [good[0], text]
    if chance < 0.8 and isinstance(good, str):
        return rng.choice((text, good + str(text), mutated_bytes(rng, good.encode()).decode(errors="replace")))
    return rng.choice((any_value(rng), text, [text]))


def around(rng: Random) -> tuple[dict[str, Any], str]:
    """Other keys of a job whose values are in the script, and the name of its file."""
    text = rng.choice((*INJECTIONS, *TEXTS))
    variables = {**TRAINING["cluster"], "env": rng.choice(({"A": text}, {text: "a"}))}
    keys: dict[str, Any] = rng.choice(({}, {"output_dir": text}, {"name": text}, {"cluster": variables}))
    return keys, rng.choice(("job.yaml", f"{text}.yaml"))


def request_of(slurm: dict[str, Any], keys: dict[str, Any], file: str, override: str, folder: Path) -> SlurmRequest:
    job = load_job({**TRAINING, **keys, "slurm": slurm}).job
    return slurm_request(job, Path(file), (override,), HERE, read_templates(job, folder))


def test_slurm_values(tmp_path: Path) -> None:
    """No value is a command of the script; bash runs every fourth script, which must leave no file."""
    for number, rng in enumerate(cases("slurm", 1000)):
        keys = rng.sample(sorted(set(GOOD) - {"template"}), rng.choice((1, 1, 2)))
        slurm = {"signal_seconds": 1, **{key: value_for(rng, key) for key in keys}}
        override = f"name={rng.choice((*INJECTIONS, *TEXTS))}"
        given = (slurm, *around(rng), override)
        made: list[SlurmRequest] = []
        check(given, lambda a=given, made=made: made.append(request_of(*a, tmp_path)))
        for request in made:
            shown = (given, request.script)
            lines = request.script.splitlines()
            assert request.script == "\n".join(lines) + "\n", shown
            assert not [line for line in lines if line.lstrip().startswith(("touch", MARK))], shown
            if number % 4 == 0:
                assert errors_of(request.script, tmp_path) == "", shown
                assert list(tmp_path.iterdir()) == [], shown


def errors_of(script: str, folder: Path) -> str:
    """What `bash -n` prints about a script; bash also runs it, with STUBS."""
    parsed = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    subprocess.run(["bash"], input=STUBS + script, text=True, capture_output=True, cwd=folder)
    return parsed.stderr
