"""The JSON schema that `launcher schema` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import yaml

import launcher
from launcher.job import Job
from tests.unit.inputs import command


class EditorYaml(yaml.SafeLoader):
    """YAML 1.2, as editors read it: 2e-5 is a number."""


EditorYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def test_the_schema_accepts_valid_jobs_and_rejects_invalid_ones() -> None:
    ended = command("schema")
    assert ended.status == 0
    schema = json.loads(ended.out)
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    example = Path(launcher.__file__).parent.parent / "examples/quickstart.yaml"
    valid = yaml.load(example.read_text(), EditorYaml)
    starter = {"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"], "eval": 0.1}, "deepspeed": {"fp16": {}}}
    for job in (valid, starter, {**starter, "train": {"betas": [0.9, 0.95], "train_batch_size": "auto"}}):
        assert list(check.iter_errors(job)) == []
    for job in ({}, {**starter, "trian": {}}, {**starter, "train": {"max_stps": 3}}, {**starter, "name": "a/b"}):
        assert list(check.iter_errors(job))


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = json.loads(command("schema").out)
    for name, section in {"Job": schema, **schema["$defs"]}.items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert "description" in value or "$ref" in value, f"{name}.{key}"
    assert set(schema["properties"]) == set(Job.model_fields) | {"script"}
