"""Reading a DeepSpeed JSON: the same data as hjson, and the location of every key."""

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


def test_comments_and_unquoted_keys_are_read_as_hjson_reads_them() -> None:
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
def test_every_key_has_its_location(path: str, line: int, column: int) -> None:
    location = parse_ds_config(TEXT, "ds.json").locations[path]
    assert (location.line, location.column) == (line, column)


def test_locations_delimit_key_and_value() -> None:
    config = parse_ds_config(TEXT, "ds.json")
    location = config.locations["optimizer.params.betas"]
    assert TEXT[location.key_start : location.key_end] == '"betas"'
    assert TEXT[location.value_start : location.value_end] == "[0.9, 0.95]"


def test_windows_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b'{\r\n  "train_batch_size": 8\r\n}\r\n')
    config = read_ds_config(tmp_path / "ds.json")
    assert config.data == {"train_batch_size": 8}
    assert config.locations["train_batch_size"].line == 2
    assert config.text is not None
    assert config.text.count("\r\n") == 3


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": 1,\n "a": 2}', 2, "duplicate key, on line 1 and on line 2"),
        ('{"z": {"a": 1,\n\n "a": 2}}', 3, "z.a: duplicate key"),
        ("[1, 2]", 1, "expected one object {…}, found a list"),
        ('{\n"a" 1}', 2, "expected ':' after a key"),
        ('{\n"a": [1, 2\n', 3, "']' is missing"),
        ('{\n"a": 1,\n', 3, "'}' is missing"),
        ('{"a": 1} more', 1, "after the end"),
        ('{\n"a": "b\n}', 2, "quote is not closed"),
        ("{ /* never closed", 1, "not closed"),
        ('{\n"a": 1e400}', 2, "a number is too large"),
        ('{\n"a": [1,\n -1e999]}', 3, "a number is too large"),
    ],
)
def test_a_syntax_error_is_reported_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_ds_config(text, "ds.json")
    assert caught.value.problems[0].line == line
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.json: file not found"):
        read_ds_config(tmp_path / "none.json")


def test_a_number_in_a_job_file_that_is_too_large_stays_text() -> None:
    """lint reports it: YAML 1.1 reads it as text too."""
    data = from_job({"a": "5e7", "b": "1e400"}, "job.yaml", "deepspeed").data
    assert data == {"a": 50_000_000, "b": "1e400"}


def test_an_inline_mapping_is_copied_and_keeps_its_lines() -> None:
    inline = {"zero_optimization": {"stage": 1}}
    config = from_mapping(inline, "job.yaml", {"zero_optimization.stage": 12})
    inline["zero_optimization"]["stage"] = 3
    assert config.get("zero_optimization.stage") == 1
    assert config.problem("zero_optimization.stage", "wrong").line == 12
