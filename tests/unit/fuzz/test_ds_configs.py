"""Random DeepSpeed JSONs: each is read, linted, fixed and completed, or rejected with a launcher error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.ds_config import compose, parse_ds_config, read_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.check import check_config
from launcher.ds_config.findings import apply_fixes
from launcher.ds_config.lint import lint
from launcher.ds_config.read import DsConfig, from_job, from_mapping
from launcher.ds_config.target import Target
from tests.unit.ds_config.public_shapes import TEMPLATES
from tests.unit.ds_config.test_compose import DECISIONS
from tests.unit.fuzz.cases import cases, check, mutated, mutated_bytes

TEXTS = [text.encode() for text in TEMPLATES.values()]


def lint_and_fix(config: DsConfig, target: Target) -> None:
    findings = lint(config, target, load_catalogue())
    if config.text is not None and (text := apply_fixes(config.text, findings)) != config.text:
        lint(parse_ds_config(text, "ds.json"), target, load_catalogue())


def completed(config: DsConfig, target: Target) -> None:
    check_config(config, target, load_catalogue())
    compose(config, DECISIONS)


def test_bytes_of_jsons(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for rng in cases("JSON bytes", 1000):
        content, target = mutated_bytes(rng, rng.choice(TEXTS)), Target(rng.choice(("cpu", "cuda")), 4)
        file.write_bytes(content)
        check(content, lambda target=target: lint_and_fix(read_ds_config(file), target))


def test_values_in_jsons() -> None:
    bases: list[Any] = [parse_ds_config(text.decode(), "ds.json").data for text in TEXTS]
    for rng in cases("JSON values", 700):
        data, target = mutated(rng, rng.choice(bases)), Target(rng.choice(("cpu", "cuda")), 4)
        if isinstance(data, dict):
            check(data, lambda data=data, target=target: lint_and_fix(from_mapping(data, "ds.json"), target))
            check(data, lambda data=data, target=target: completed(from_job(data, "job.yaml", "deepspeed"), target))
