"""Random DeepSpeed JSONs through reading, lint with its fixes, and completion: only errors of the launcher."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from launcher.cli.lint_output import findings_json, print_findings
from launcher.ds_config import DsConfig, from_job, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.lint_files import lint_file
from launcher.ds_config.target import Target
from launcher.lr_report.deepspeed_json import deepspeed_report
from launcher.lr_report.report import report_json
from launcher.plan.inputs import plan_inputs
from launcher.plan.resolve import check_inputs, resolve
from launcher.presets import shipped_folder
from launcher.runs.planning import lint_ds_config
from tests.unit.ds_config.failing_jsons import ACCEPTED, REJECTED
from tests.unit.ds_config.public_shapes import TEMPLATES
from tests.unit.fuzz.mutations import as_json, damaged, inputs, mutated, only_launcher_errors
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts

TEXTS = [
    *(file.read_bytes() for file in sorted(shipped_folder("ds_configs").glob("*.json"))),
    *(text.encode() for text in TEMPLATES.values()),
]
CONFIGS: list[dict[str, Any]] = [*(row.config for row in REJECTED), *ACCEPTED]
KEYS = load_catalogue()
TARGETS = (Target("cpu", None, frozenset(), False), Target("cuda", 8, frozenset(), True))


def check(file: Path, given: Any) -> None:
    """Everything that reads a DeepSpeed JSON from a file."""
    with only_launcher_errors(given), redirect_stdout(io.StringIO()):
        for target in TARGETS:
            found = {str(file): lint_file(file, target, KEYS, fix=False)}
            findings_json(found)
            print_findings(found, target.device)
    with only_launcher_errors(given):
        report_json(deepspeed_report(file, (), 50, ()))
    with only_launcher_errors(given):
        complete(read_ds_config(file))


def complete(config: DsConfig) -> None:
    inputs = plan_inputs(job_of(), config, machine_facts(8))
    lint_ds_config(inputs)
    check_inputs(inputs)
    resolve(inputs, model_facts(), data_facts()).to_json().encode()


def test_bytes(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for random in inputs("DeepSpeed bytes", 500):
        text = damaged(random, random.choice(TEXTS))
        file.write_bytes(text)
        check(file, text)


def test_values(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    known = [*CONFIGS, *(json.loads(text) for text in TEXTS[:5])]
    for random in inputs("DeepSpeed values", 800):
        config = mutated(random, random.choice(known))
        file.write_bytes(as_json(config))
        check(file, config)


def test_mappings_in_a_job() -> None:
    """Unlike a file, a mapping of a job has values of YAML."""
    for random in inputs("DeepSpeed mappings", 400):
        config = mutated(random, random.choice(CONFIGS))
        if isinstance(config, dict):
            with only_launcher_errors(config):
                complete(from_job(config, "job.yaml", "deepspeed"))


def test_fixes_are_written_to_a_file_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for random in inputs("DeepSpeed fixes", 500):
        text = as_json(mutated(random, random.choice(CONFIGS)))
        if random.random() < 0.3:
            text = damaged(random, text)
        file.write_bytes(text)
        with only_launcher_errors(text):
            lint_file(file, random.choice(TARGETS), KEYS, fix=True)
        if file.read_bytes() != text:
            read_ds_config(file)


def test_the_unchanged_inputs_are_completed() -> None:
    """The random changes start from JSONs that the launcher accepts."""
    for config in ACCEPTED[:10]:
        complete(from_job(config, "job.yaml", "deepspeed"))
