"""The Python API: what `from launcher import …` provides, and that it does what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import launcher
from launcher import RequestError, load_job, make_plan
from launcher.job import Job, ScriptJob
from tests.unit.inputs import command, data_facts, model_facts, remember, write_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a job, its model and its data, both measured."""
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    remember(tmp_path / "job.yaml", (), model_facts(parameters=10**8), data_facts(320))
    return tmp_path


def test_every_name_in_all_exists_and_unknown_names_raise() -> None:
    assert all(getattr(launcher, name) is not None for name in launcher.__all__)
    with pytest.raises(AttributeError, match="'launcher' has no attribute 'trian'"):
        launcher.trian  # noqa: B018


def test_import_launcher_imports_only_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import launcher; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert packages - sys.stdlib_module_names == {"launcher"}


@pytest.mark.usefixtures("folder")
def test_make_plan_gives_the_plan_of_the_command() -> None:
    overrides = ("train.max_steps=20", "cluster.processes_per_node=2")
    plan = make_plan(load_job("job.yaml", *overrides))
    assert plan.length.total_updates == 20
    assert json.loads(plan.to_json()) == json.loads(command("plan", "job.yaml", *overrides, "--json").out)


@pytest.mark.usefixtures("folder")
def test_a_job_may_be_a_mapping() -> None:
    sections = {"model": {"name_or_path": "model"}, "data": {"train": "data/train.jsonl"}}
    sections |= {"name": "job", "cluster": {"gpus_per_node": 0, "processes_per_node": 4}}
    loaded = load_job(sections, "train.max_steps=20")
    assert loaded.job == load_job("job.yaml", "train.max_steps=20").job
    assert make_plan(loaded) == make_plan(load_job("job.yaml", "train.max_steps=20"))
    assert "train" not in sections


@pytest.mark.usefixtures("folder")
def test_a_mapping_may_have_paths() -> None:
    sections = {"name": "job", "model": {"name_or_path": Path("model")}, "data": {"train": [Path("data/train.jsonl")]}}
    job = load_job({**sections, "output_dir": Path("runs")}).job
    assert isinstance(job, Job)
    assert (job.model.name_or_path, job.data.train, job.output_dir) == ("model", ["data/train.jsonl"], "runs")


WRONG_TYPES = {
    "run of a path": (lambda: launcher.run("job.yaml"), "a job from load_job is needed, found str"),
    "plan of a mapping": (lambda: make_plan({"name": "job"}), "a job from load_job is needed, found dict"),
    "a number": (lambda: load_job(7), "a job must be a file or a mapping, found int"),
    "a list of overrides": (lambda: load_job("job.yaml", ["train.max_steps=2"]), "an override must be text"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_is_an_error_with_a_hint(name: str) -> None:
    call, message = WRONG_TYPES[name]
    with pytest.raises(RequestError, match=message) as caught:
        call()
    assert caught.value.problems[0].hint


@pytest.mark.usefixtures("folder")
def test_an_error_in_an_override_is_located_on_the_command_line() -> None:
    for override in ("trian.max_steps=3", "deepspeed=nothing.json"):
        with pytest.raises(RequestError, match=r"^command line: (trian|deepspeed):"):
            make_plan(load_job("job.yaml", override))


def test_an_error_names_file_line_and_key(folder: Path) -> None:
    (folder / "job.yaml").write_text((folder / "job.yaml").read_text() + "train:\n  eval_every: 5\n")
    with pytest.raises(RequestError) as caught:
        make_plan(load_job("job.yaml"))
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.key) == ("job.yaml", 5, "train.eval_every")


def test_a_key_of_an_inline_ds_config_has_its_line_in_the_job_file(folder: Path) -> None:
    job = (folder / "job.yaml").read_text() + "deepspeed:\n  zero_optimization:\n    stage: 7\n"
    (folder / "job.yaml").write_text(job)
    with pytest.raises(RequestError, match=r"^job.yaml:6: deepspeed\.zero_optimization\.stage"):
        make_plan(load_job("job.yaml"))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[train.py, --lr, '{learning_rate}', two words]", ["train.py", "--lr", "{learning_rate}", "two words"]),
        ("train.py --lr {learning_rate} 'two words'", ["train.py", "--lr", "{learning_rate}", "two words"]),
        ("-m package.train", ["-m", "package.train"]),
    ],
)
def test_a_script_section_makes_a_script_job(tmp_path: Path, written: str, read: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"script:\n  command: {written}\n")
    job = load_job(path).job
    assert isinstance(job, ScriptJob)
    assert (job.script.command, job.script.folder) == (read, ".")
    replaced = load_job(path, command=["other.py"]).job
    assert isinstance(replaced, ScriptJob) and replaced.script.command == ["other.py"]


@pytest.mark.usefixtures("folder")
def test_a_command_makes_any_job_a_script_job() -> None:
    assert not isinstance(load_job("job.yaml").job, ScriptJob)
    assert isinstance(load_job("job.yaml", command=["train.py"]).job, ScriptJob)
    with pytest.raises(RequestError, match=r"job.yaml: script\.command: no script is named"):
        load_job("job.yaml", command=[])


def test_an_unclosed_quote_in_a_command_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text('script:\n  command: "train.py \'two"\n')
    with pytest.raises(RequestError, match=r"job.yaml:2: script\.command: a quote is not closed"):
        load_job(path)


@pytest.mark.usefixtures("folder")
def test_a_run_in_another_thread_than_the_main_one_is_refused_before_it_starts(folder: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        for started in (threads.submit(launcher.run, load_job("job.yaml")), threads.submit(launcher.resume, "runs/x")):
            with pytest.raises(RequestError, match="must be started in the main thread of its process"):
                started.result()
    assert list(folder.glob("runs/job-*")) == []
