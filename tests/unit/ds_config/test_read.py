"""Reading a DeepSpeed JSON: the same data as hjson, and where every key stands."""

from __future__ import annotations

import json
from pathlib import Path

import hjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.ds_config import from_job, from_mapping, parse_ds_config, read_ds_config
from launcher.errors import RequestError

TEXT = """{
  // batch sizes are filled in
  "train_batch_size": "auto",
  zero_optimization: {
    "stage": 2, # two
    "reduce_bucket_size": 5e8,
    "overlap_comm": true,
  },
  /* several
     lines */
  "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.95]}}
}
"""

TEXTS = st.text(alphabet="ab é\"'\\\n{}[]:,#/*0", max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)


def test_comments_and_free_form_are_read_as_hjson_reads_them() -> None:
    config = parse_ds_config(TEXT, "ds.json")
    assert config.data == hjson.loads(TEXT)
    assert config.get("zero_optimization.reduce_bucket_size") == 500000000


@settings(deadline=None)
@given(st.dictionaries(TEXTS, values, max_size=5), st.sampled_from([None, 2]))
def test_any_json_is_read_as_hjson_reads_it(data: dict[str, object], indent: int | None) -> None:
    text = json.dumps(data, indent=indent)
    assert parse_ds_config(text, "ds.json").data == hjson.loads(text)


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        ("train_batch_size", 3, 3),
        ("zero_optimization", 4, 3),
        ("zero_optimization.stage", 5, 5),
        ("optimizer.params.lr", 11, 45),
    ],
)
def test_every_key_has_its_place(path: str, line: int, column: int) -> None:
    place = parse_ds_config(TEXT, "ds.json").places[path]
    assert (place.line, place.column) == (line, column)


def test_places_delimit_key_and_value() -> None:
    config = parse_ds_config(TEXT, "ds.json")
    place = config.places["optimizer.params.betas"]
    assert TEXT[place.key_start : place.key_end] == '"betas"'
    assert TEXT[place.value_start : place.value_end] == "[0.9, 0.95]"


def test_line_ends_of_windows_stay(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b'{\r\n  "train_batch_size": 8\r\n}\r\n')
    config = read_ds_config(tmp_path / "ds.json")
    assert config.data == {"train_batch_size": 8}
    assert config.places["train_batch_size"].line == 2
    assert config.text is not None
    assert config.text.count("\r\n") == 3


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": 1,\n "a": 2}', 2, "stands twice, on line 1 and on line 2"),
        ('{"z": {"a": 1,\n\n "a": 2}}', 3, "z.a: the key stands twice"),
        ("[1, 2]", 1, "a list where one object"),
        ('{\n"a" 1}', 2, "':' expected after a key"),
        ('{\n"a": [1, 2\n', 3, "']' is missing"),
        ('{\n"a": 1,\n', 3, "'}' is missing"),
        ('{"a": 1} more', 1, "after the end"),
        ('{\n"a": "b\n}', 2, "quote is not closed"),
        ("{ /* never closed", 1, "not closed"),
        ('{\n"a": 1e400}', 2, "a number too large to be read"),
        ('{\n"a": [1,\n -1e999]}', 3, "a number too large to be read"),
    ],
)
def test_broken_text_is_told_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_ds_config(text, "ds.json")
    assert caught.value.problems[0].line == line
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.json: there is no such file"):
        read_ds_config(tmp_path / "none.json")


def test_a_number_of_a_job_file_that_is_too_large_stays_text() -> None:
    """For lint to tell: YAML 1.1 has it as text too."""
    data = from_job({"a": "5e7", "b": "1e400"}, "job.yaml", "deepspeed").data
    assert data == {"a": 50_000_000, "b": "1e400"}


def test_an_inline_mapping_is_copied_and_knows_the_lines_it_was_given() -> None:
    inline = {"zero_optimization": {"stage": 1}}
    config = from_mapping(inline, "job.yaml", {"zero_optimization.stage": 12})
    inline["zero_optimization"]["stage"] = 3
    assert config.get("zero_optimization.stage") == 1
    assert config.problem("zero_optimization.stage", "wrong").line == 12
