"""Random DeepSpeed JSONs: each is read, linted, fixed, completed and plotted, or rejected with a launcher error."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from launcher.cli.lint_output import findings_json, print_findings
from launcher.ds_config import compose, parse_ds_config, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.check import check_config
from launcher.ds_config.findings import apply_fixes
from launcher.ds_config.lint import lint
from launcher.ds_config.lint_files import lint_file
from launcher.ds_config.read import DsConfig, from_job, from_mapping
from launcher.ds_config.target import Target
from launcher.lr_report.deepspeed_json import deepspeed_report
from launcher.lr_report.report import report_json
from tests.unit.ds_config.failing_jsons import ACCEPTED, REJECTED
from tests.unit.ds_config.public_shapes import TEMPLATES
from tests.unit.ds_config.test_compose import DECISIONS
from tests.unit.fuzz.cases import cases, check, mutated, mutated_bytes

TEXTS = [text.encode() for text in TEMPLATES.values()]
CONFIGS = [*(row.config for row in REJECTED), *ACCEPTED]
KEYS = load_catalogue()
CPU, GPU = Target("cpu", 4), Target("cuda", 4)


def lint_and_fix(config: DsConfig, target: Target) -> None:
    findings = lint(config, target, KEYS)
    if config.text is not None and (text := apply_fixes(config.text, findings)) != config.text:
        lint(parse_ds_config(text, "ds.json"), target, KEYS)


def completed(config: DsConfig, target: Target) -> None:
    check_config(config, target, KEYS)
    compose(config, DECISIONS)


def printed_and_fixed(file: Path, target: Target) -> None:
    """`launcher lint` prints the findings, and leaves a file that can be read if it writes fixes."""
    before = file.read_bytes()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for fix in (False, True):
            found = {str(file): lint_file(file, target, KEYS, fix=fix)}
            findings_json(found).encode()
            print_findings(found, target.device)
    assert "\x1b" not in output.getvalue()
    if file.read_bytes() != before:
        read_ds_config(file)


def plotted(file: Path) -> None:
    report_json(deepspeed_report(file, (), 50, ())).encode()


def test_bytes_of_jsons(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for rng in cases("JSON bytes", 1000):
        content, target = mutated_bytes(rng, rng.choice(TEXTS)), rng.choice((CPU, GPU))
        file.write_bytes(content)
        check(content, lambda target=target: lint_and_fix(read_ds_config(file), target))


def test_values_in_jsons() -> None:
    bases: list[Any] = [parse_ds_config(text.decode(), "ds.json").data for text in TEXTS]
    for rng in cases("JSON values", 700):
        data, target = mutated(rng, rng.choice(bases)), rng.choice((CPU, GPU))
        if isinstance(data, dict):
            check(data, lambda data=data, target=target: lint_and_fix(from_mapping(data, "ds.json"), target))
            check(data, lambda data=data, target=target: completed(from_job(data, "job.yaml", "deepspeed"), target))


def test_files_with_faults_that_engines_have(tmp_path: Path) -> None:
    """What an engine refuses, and neighbours of it that run, with a further random fault."""
    file = tmp_path / "ds.json"
    for rng in cases("JSON faults", 600):
        config, target = mutated(rng, rng.choice(CONFIGS)), rng.choice((CPU, GPU))
        file.write_text(json.dumps(config))
        check(config, lambda: plotted(file))
        check(config, lambda target=target: completed(read_ds_config(file), target))
        if isinstance(config, dict):
            check(config, lambda c=config, target=target: completed(from_job(c, "job.yaml", "deepspeed"), target))
        check(config, lambda target=target: printed_and_fixed(file, target))
