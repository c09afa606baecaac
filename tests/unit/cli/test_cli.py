"""The command line: the output of `plan`, `init` and `schema`, and exit statuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console

import launcher
from launcher.job import Job, load_job
from launcher.plan.schema import Plan
from launcher.presets import preset_names, shipped_folder
from launcher.run_dir import RunDir, write_manifest
from launcher.runs.console import RunConsole
from launcher.runs.outcome import Outcome
from launcher.runs.summary import print_summary
from tests.unit.inputs import command, data_facts, model_facts, plan_of, remember, write_folder


class EditorYaml(yaml.SafeLoader):
    """YAML 1.2, as editors read it: 2e-5 is a number."""


EditorYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_prints_a_plan_and_writes_nothing(folder: Path) -> None:
    sizes = ("train.train_batch_size=32", "train.train_micro_batch_size_per_gpu=8")
    remember(folder / "job.yaml", sizes, model_facts(parameters=1_000_000), data_facts(320))
    before = set(folder.rglob("*"))
    ended = command("plan", "job.yaml", *sizes)
    assert ended.status == 0
    for words in (
        "llama, 1,000,000 parameters",
        "4 ranks: 1 node x 4 on CPU, gloo, fp32",
        "320 sequences, 32,000 tokens, 19,200 learned",
        "32 = micro-batch 8 x accumulation 1 x world size 4",
        "10 in total, 10.0 per epoch",
        "learning rate",
        "memory per process",
        "under ZeRO-2",
        "filled in or changed",
    ):
        assert words in ended.out
    assert set(folder.rglob("*")) == before


def test_plan_prints_json(folder: Path) -> None:
    overrides = ("train.max_steps=7", "schedule.peak_lr=1e-5")
    remember(folder / "job.yaml", overrides, model_facts(), data_facts())
    ended = command("plan", "job.yaml", *overrides, "--json")
    assert ended.status == 0
    plan = Plan.from_json(ended.out)
    assert plan.length.total_updates == 7
    assert plan.learning_rate.peak_lr == 1e-5
    assert command("plan", "job.yaml", *overrides, "--json").out == ended.out


def test_init_writes_a_valid_job_and_never_overwrites(folder: Path) -> None:
    ended = command("init", "new", "--model", "models/ä \U0001f600", "--data", "d/*.jsonl", "--name", "mine")
    assert ended.status == 0
    job = load_job(folder / "new/mine.yaml").job
    assert (job.name, job.model.name_or_path, job.data.train) == ("mine", "models/ä \U0001f600", "d/*.jsonl")
    for name in preset_names():
        copied = folder / f"new/ds_configs/{name}.json"
        assert copied.read_bytes() == (shipped_folder("ds_configs") / copied.name).read_bytes()
    assert str(job.deepspeed) in {f"ds_configs/{name}.json" for name in preset_names()}
    assert "next: cd new && launcher plan mine.yaml" in ended.out

    (folder / "new/mine.yaml").write_text("my own")
    before = {path: path.read_bytes() for path in (folder / "new").rglob("*") if path.is_file()}
    again = command("init", "new", "--name", "mine")
    assert again.status == 2
    assert "mine.yaml" in again.err
    assert "are not overwritten" in again.err
    assert {path: path.read_bytes() for path in (folder / "new").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x", "--name", "a/b"), "name: must be letters"),
        (("x", "--name", "../up"), "name: must be letters"),
        (("x", "--model", "a\nb"), "model.name_or_path: must be text without line breaks"),
        (("x", "--data", ""), "data.train: must not be empty"),
        (("x", "--data", "a\x07b"), "data.train: must be text without line breaks"),
        (("job.yaml",), "this is a file; a folder is needed"),
    ],
)
def test_init_rejects_invalid_values(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    before = set(folder.rglob("*"))
    ended = command("init", *arguments)
    assert ended.status == 2
    assert says in ended.err
    assert set(folder.rglob("*")) == before


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


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--version",), 0, launcher.__version__),
        (("--help",), 0, "Usage"),
        ((), 2, "Usage"),
        (("trian",), 2, "No such command 'trian'"),
        (("run",), 2, "Missing argument"),
        (("plan", "job.yaml", "--jsn"), 2, "--json"),
        (("resume", "nowhere"), 2, "was not found"),
    ],
)
def test_exit_statuses(arguments: tuple[str, ...], status: int, says: str) -> None:
    ended = command(*arguments)
    assert ended.status == status
    assert says in ended.out + ended.err


def test_resume_reports_a_missing_checkpoint_and_an_altered_plan(folder: Path) -> None:
    run = RunDir.create(folder / "runs", "tiny")
    plan = plan_of()
    run.plan_file.write_text(plan.to_json())
    ended = command("resume", str(run.path))
    assert (ended.status, "no complete checkpoint" in ended.err) == (2, True)

    run.checkpoint(1).mkdir()
    write_manifest(run.checkpoint(1), update=1, samples=8, world_size=8, plan_sha256=plan.sha256)
    run.plan_file.write_text(run.plan_file.read_text().replace('"seed": 42', '"seed": 43'))
    ended = command("resume", str(run.path))
    assert (ended.status, "plan.json was changed" in ended.err) == (1, True)
    assert "Traceback" not in ended.err


def test_an_unusable_file_is_reported_without_a_traceback(folder: Path) -> None:
    run = RunDir.create(folder / "runs", "tiny")
    run.plan_file.write_text(plan_of().to_json())
    run.lock_file.mkdir()
    ended = command("resume", str(run.path))
    assert (ended.status, ended.err) == (1, f"error: {run.lock_file}: Is a directory\n")


def test_launcher_runs_as_a_module(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "launcher", "--version"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"launcher {launcher.__version__}\n", "")
    wrong = subprocess.run([sys.executable, "-m", "launcher", "resume", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "was not found" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_closed_output_pipe_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "launcher", "schema"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


def test_a_run_continues_when_its_output_pipe_is_closed(folder: Path) -> None:
    code = (
        "from launcher.runs.console import RunConsole\nconsole = RunConsole()\n"
        "for update in range(99): console.note('x' * 9999)\nopen('end', 'w').close()"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr, (folder / "end").exists()) == (0, "", True)


@pytest.mark.parametrize(("name", "private"), [("run", True), ("export", True), ("schema", False), ("init", False)])
def test_files_of_a_run_are_private(name: str, private: bool) -> None:
    """In a separate process, since the umask belongs to the process."""
    code = (
        "import os, sys\nfrom launcher import cli\nsys.argv = ['launcher', sys.argv[1], 'nowhere']\n"
        "os.umask(0o022)\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint(oct(os.umask(0)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == ("0o77" if private else "0o22")


def test_the_summary_skips_damaged_evaluation_lines(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "tiny")
    lines = ['{"update": 0, "loss": "nan"}', "{}", '{"update": 8, "loss": 1.25}', '{"update": 9, "lo']
    run.evaluations_file.write_text("\n".join(lines))
    console = RunConsole(Console(width=500, record=True))
    print_summary(plan_of(), run, console, Outcome("finished", 8))
    text = console.console.export_text()
    assert "evaluation loss  nan before, 1.2500 after" in text
    assert "skipped 1 damaged line of evaluations.jsonl" in text
