"""Reading valid job files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import Problem, RequestError
from launcher.job import Job, explicit_keys, load_job, validate_job
from launcher.job.read import apply_override, load_yaml
from tests.unit.inputs import JOB, job_of


def read(tmp_path: Path, text: str, *overrides: str, name: str = "job.yaml") -> Job:
    path = tmp_path / name
    path.write_text(text)
    return load_job(path, *overrides).job


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("schedule: {peak_lr: 1e-5}", "schedule", "peak_lr", 1e-5),
        ("train: {max_steps: 1e3}", "train", "max_steps", 1000),
        ("train: {max_steps: 1_000}", "train", "max_steps", 1000),
        ("train: {max_steps: '20'}", "train", "max_steps", 20),
        ("train: {num_train_epochs: 5e-1}", "train", "num_train_epochs", 0.5),
        ("train: {betas: [9e-1, 0.95]}", "train", "betas", (0.9, 0.95)),
        ("schedule: {warmup: 1}", "schedule", "warmup", 1),
        ("schedule: {warmup: 3%}", "schedule", "warmup", "3%"),
        ("schedule: {warmup: 2M tokens}", "schedule", "warmup", "2M tokens"),
        ("schedule: {decay_at: [100, 0.5, 1e3, 1.0]}", "schedule", "decay_at", [100, 0.5, 1000, 1.0]),
        ("schedule: {decay_start: 8e-1}", "schedule", "decay_start", 0.8),
        ("cluster: {gpus_per_node: auto}", "cluster", "gpus_per_node", "auto"),
    ],
)
def test_all_spellings_of_numbers_are_read_as_numbers(
    tmp_path: Path, text: str, section: str, key: str, value: Any
) -> None:
    job = read(tmp_path, "model: {name_or_path: m}\ndata: {train: t.jsonl}\n" + text)
    found = getattr(getattr(job, section), key)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("written", "found"), [("off", "off"), ("'off'", "off"), ("full", "full"), ("auto", "auto"), ("", "auto")]
)
def test_health_checks_are_off_also_without_quotes(tmp_path: Path, written: str, found: str) -> None:
    """YAML 1.1 reads off as false."""
    text = "model: {name_or_path: m}\ndata: {train: t.jsonl}\n"
    job = read(tmp_path, f"{text}cluster: {{health_checks: {written}}}\n" if written else text)
    assert job.cluster.health_checks == found
    if written:
        assert read(tmp_path, text, f"cluster.health_checks={written}").cluster.health_checks == found


@pytest.mark.parametrize(("until", "found"), [(1, 1), (1.0, 1.0), ("1e2", 100), (0.25, 0.25), (100.0, 100)])
def test_the_end_of_a_segment_is_an_update_or_a_fraction(until: Any, found: float) -> None:
    segments = [{"kind": "linear", "until": until, "to": 0}]
    end = job_of(schedule={"shape": "compound", "segments": segments}).schedule.segments[0].until  # type: ignore[index]
    assert (end, type(end)) == (found, type(found))


@pytest.mark.parametrize(
    ("value", "found"),
    [("0.02", 0.02), ("2e-2", 0.02), (0.5, 0.5), ("held-out.jsonl", "held-out.jsonl"), (["a.csv"], ["a.csv"])],
)
def test_evaluation_data_is_a_fraction_or_files(value: Any, found: Any) -> None:
    assert job_of(data={"eval": value}).data.eval == found


@pytest.mark.parametrize(
    ("file", "name"), [("my job.yaml", "my-job"), ("..x.yaml", "x"), ("ä.yaml", "job"), ("a" * 80 + ".yaml", "a" * 64)]
)
def test_the_default_name_is_the_file_name(tmp_path: Path, file: str, name: str) -> None:
    assert read(tmp_path, JOB, name=file).name == name
    assert read(tmp_path, JOB + "name: other\n", name=file).name == "other"


def test_overrides_replace_the_files_values_in_order(tmp_path: Path) -> None:
    text = JOB + "train: {max_steps: 5}\ndeepspeed: {zero_optimization: {stage: 2}}\n"
    job = read(
        tmp_path,
        text,
        "train.max_steps=7",
        "train.max_steps=8",
        "schedule.peak_lr=1e-5",
        "data.train=[a.jsonl, b.jsonl]",
        "cluster.env.NCCL_DEBUG=INFO",
        "deepspeed.zero_optimization.stage=3",
    )
    assert job.train.max_steps == 8
    assert job.schedule.peak_lr == 1e-5
    assert job.data.train == ["a.jsonl", "b.jsonl"]
    assert job.cluster.env == {"NCCL_DEBUG": "INFO"}
    assert job.deepspeed == {"zero_optimization": {"stage": 3}}


def test_a_length_on_the_command_line_replaces_the_length_in_the_file(tmp_path: Path) -> None:
    text = JOB + "train: {num_train_epochs: 3}\n"
    train = read(tmp_path, text, "train.max_steps=20").train
    assert (train.num_train_epochs, train.max_steps) == (None, 20)
    assert read(tmp_path, text, "train.max_steps=null").train.num_train_epochs == 3
    with pytest.raises(RequestError, match="max_steps and total_samples are both set"):
        read(tmp_path, text, "train.max_steps=20", "train.total_samples=9")


def test_null_unsets_a_key(tmp_path: Path) -> None:
    job = read(tmp_path, JOB + "train: {num_train_epochs: 3}\n", "train.num_train_epochs=null", "train.max_steps=2")
    assert (job.train.num_train_epochs, job.train.max_steps) == (None, 2)


def test_the_value_of_an_override_may_contain_an_equals_sign() -> None:
    data: dict[str, Any] = {}
    assert apply_override(data, "cluster.env.FLAGS=a=b") == ("cluster", "env", "FLAGS")
    assert data == {"cluster": {"env": {"FLAGS": "a=b"}}}


def test_explicit_keys_have_a_value_other_than_auto_and_null() -> None:
    job = job_of(train={"max_steps": 3, "train_batch_size": "auto", "eval_every": None}, schedule={"warmup": 0})
    assert explicit_keys(job) == {"name", "model.name_or_path", "data.train", "train.max_steps", "schedule.warmup"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("abc", max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), inner),
        max_leaves=12,
    )
)
def test_any_value_gives_a_job_or_a_request_error(value: Any) -> None:
    for section in Job.model_fields:
        base = {"model": {"name_or_path": "m"}, "data": {"train": "t"}, section: value}
        with contextlib.suppress(RequestError):
            assert isinstance(validate_job(base), Job)


@given(st.text("ab:{}[]-'\"&*#|>!%@` \n\t0.\x00\x85é", max_size=40))
def test_any_text_gives_data_or_a_request_error(text: str) -> None:
    with contextlib.suppress(RequestError):
        load_yaml(text, "job.yaml")


def test_keys_have_the_line_numbers_of_the_file() -> None:
    _, lines = load_yaml("a: 1\nb:\n  c:\n  - d: 2\n  - e\n", "f")
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", "0"): 4,
        ("b", "c", "0", "d"): 4,
        ("b", "c", "1"): 5,
    }


@pytest.mark.parametrize(
    ("key", "file", "line"),
    [
        ("train.max_steps", "job.yaml", 5),
        ("train.eval_every", "job.yaml", 4),
        ("schedule.warmup", "job.yaml", None),
        ("data.train", "command line", None),
        ("fp16.enabled", None, None),
        (None, None, None),
    ],
)
def test_a_late_problem_gets_its_file_and_line(
    tmp_path: Path, key: str | None, file: str | None, line: int | None
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "train:\n  max_steps: 3\n")

    def late() -> None:
        with load_job(path, "data.train=x").locate_errors():
            raise RequestError(Problem("wrong", key=key))

    with pytest.raises(RequestError) as caught:
        late()
    found = caught.value.problems[0]
    assert (found.file and Path(found.file).name, found.line, found.key) == (file, line, key)


def test_a_problem_with_a_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    problem = Problem("wrong", file="ds.json", line=7, key="data.train")

    def late() -> None:
        with load_job(path).locate_errors():
            raise RequestError(problem)

    with pytest.raises(RequestError) as caught:
        late()
    assert caught.value.problems == (problem,)


def test_a_time_is_not_a_base_60_number(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nslurm: {time: 24:00:00}\n")
    assert load_job(path).job.slurm.time == "24:00:00"
    assert load_job(path, "slurm.time=1:30:00").job.slurm.time == "1:30:00"
    assert load_job(path, "slurm.time=90").job.slurm.time == "90"
