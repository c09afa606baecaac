"""Real tokenising: every kind of file, what is learned decoded back to text, and the cache."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.errors import RequestError
from launcher.job import Job, validate_job
from launcher.plan.facts import DataFacts
from launcher.prepare import Prepared, prepare
from launcher.prepare.hub_rows import hub_readers, saved_reader
from launcher.prepare.read_rows import held_out_rows
from launcher.prepare.request import Request, cached, run_request
from launcher.prepare.rows import BadFile
from launcher.prepare.sources import DataSource
from launcher.prepare.tokenise import TextRequest, tokenise
from launcher.token_store import TokenStore
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.tiny_models import make_tiny_tokenizer

pytestmark = pytest.mark.local

Rows = list[dict[str, Any]]

CHATS: Rows = [
    {"messages": [{"role": "user", "content": "alpha beta"}, {"role": "assistant", "content": "beta alpha"}]},
    {
        "messages": [
            {"role": "system", "content": "reverse"},
            {"role": "user", "content": "mu kappa"},
            {"role": "assistant", "content": "kappa, mu!"},
            {"role": "user", "content": "eta"},
            {"role": "assistant", "content": "é — 漢字 \U0001f600"},
        ]
    },
    {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]},
]
PAIRS: Rows = [
    {"prompt": "alpha beta ->", "completion": " beta alpha"},
    {"prompt": "gamma ->", "completion": " gamma\nend"},
]
TEXTS: Rows = [{"text": "alpha beta gamma"}, {"text": "delta\nepsilon"}]


def as_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows))


def as_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".parquet": as_parquet,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def tokenised(
    tokenizer_folder: Path, file: Path, *, kind: str = "auto", max_length: int = 1000, eval: float | None = None
) -> DataFacts:
    builder = {".jsonl": "json", ".json": "json", ".txt": "text"}.get(file.suffix, file.suffix[1:])
    request = TextRequest(DataSource((file,), builder), eval, kind, max_length, "train", seed=3)
    target = file.parent / f"tokens-{file.name}"
    return tokenise(request, tokenizer_folder, target, False, lambda **_: None)


def sequences(facts: DataFacts, tokenizer_folder: Path) -> list[tuple[str, list[str]]]:
    """For each sequence its whole text, and the text of each run of learned tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    store = TokenStore(Path(facts.train.folder))
    return [(tokenizer.decode(store[i][0]), _runs(tokenizer, *store[i])) for i in range(len(store))]


def _runs(tokenizer: Any, tokens: Any, learned: Any) -> list[str]:
    runs: list[list[int]] = []
    for i, (token, bit) in enumerate(zip(tokens.tolist(), learned.tolist(), strict=True)):
        if bit and (i == 0 or not learned[i - 1]):
            runs.append([])
        if bit:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_assistant_turns_are_learned_exactly(suffix: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"chats{suffix}"
    WRITERS[suffix](file, CHATS)
    facts = tokenised(tokenizer_folder, file)
    assert (facts.format, facts.train.rows, facts.train.dropped) == ("messages", 3, 0)
    assert sequences(facts, tokenizer_folder) == [
        ("<|user|>alpha beta<|end|><|assistant|>beta alpha<|end|>", ["beta alpha<|end|>"]),
        (
            "<|system|>reverse<|end|><|user|>mu kappa<|end|><|assistant|>kappa, mu!<|end|>"
            "<|user|>eta<|end|><|assistant|>é — 漢字 \U0001f600<|end|>",
            ["kappa, mu!<|end|>", "é — 漢字 \U0001f600<|end|>"],
        ),
        ("<|assistant|>hello<|end|><|user|>bye<|end|>", ["hello<|end|>"]),
    ]


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_completions_are_learned_with_an_end(suffix: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{suffix}"
    WRITERS[suffix](file, PAIRS)
    facts = tokenised(tokenizer_folder, file)
    assert facts.format == "prompt-completion"
    assert sequences(facts, tokenizer_folder) == [
        ("alpha beta -> beta alpha<|end|>", [" beta alpha<|end|>"]),
        ("gamma -> gamma\nend<|end|>", [" gamma\nend<|end|>"]),
    ]


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_text_is_learned_whole(suffix: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"texts{suffix}"
    WRITERS[suffix](file, TEXTS)
    facts = tokenised(tokenizer_folder, file)
    whole = [row["text"] + "<|end|>" for row in TEXTS]
    assert sequences(facts, tokenizer_folder) == [(text, [text]) for text in whole]
    assert facts.train.targets == facts.train.tokens - facts.train.sequences


def test_a_text_file_is_one_document(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("alpha beta\n\ngamma delta\n")
    facts = tokenised(tokenizer_folder, file)
    assert [text for text, _ in sequences(facts, tokenizer_folder)] == ["alpha beta\n\ngamma delta\n<|end|>"]


def test_long_text_is_divided_and_nothing_is_lost(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("alpha beta gamma delta " * 40)
    facts = tokenised(tokenizer_folder, file, max_length=16)
    assert "".join(text for text, _ in sequences(facts, tokenizer_folder)) == file.read_text() + "<|end|>"
    assert facts.train.sequences > 5
    assert (facts.train.longest, facts.train.cut) == (16, 0)


def test_long_rows_are_cut_and_counted_and_empty_ones_dropped(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "alpha", "completion": " beta"},
        {"prompt": "alpha", "completion": " beta" * 30},
        {"prompt": "gamma " * 30, "completion": " beta"},
        {"prompt": "alpha", "completion": ""},
    ]
    as_jsonl(file, rows)
    facts = tokenised(tokenizer_folder, file, max_length=8)
    assert (facts.train.rows, facts.train.sequences) == (4, 2)
    assert (facts.train.cut, facts.train.dropped) == (2, 2)
    found = sequences(facts, tokenizer_folder)
    assert found[0] == ("alpha beta<|end|>", [" beta<|end|>"])
    assert found[1][1] == [found[1][0].removeprefix("alpha")]
    assert facts.train.longest == 8


def test_a_share_is_held_out_the_same_each_time_and_apart(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    as_jsonl(file, [{"text": f"alpha {number}"} for number in range(50)])

    def parts() -> list[list[str]]:
        facts = tokenised(tokenizer_folder, file, eval=0.1)
        halves = (facts, facts.model_copy(update={"train": facts.eval}))
        return [[text for text, _ in sequences(half, tokenizer_folder)] for half in halves]

    train, held_out = parts()
    assert (len(train), len(held_out)) == (45, 5)
    assert not set(train) & set(held_out)
    shutil.rmtree(tmp_path / f"tokens-{file.name}")
    assert parts() == [train, held_out]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read"),
        ("broken.parquet", "this is no parquet", "cannot be read"),
        ("empty.jsonl", "", "cannot be read|found no rows"),
        ("strange.jsonl", '{"question": "a", "answer": "b"}\n', "columns answer, question do not match any format"),
        ("bad.jsonl", '{"messages": [{"role": "user"}]}\n', "row 1: a message needs role and content"),
        ("blank.jsonl", '{"text": " "}\n', "has anything to learn"),
        ("short.csv", "prompt,completion\na,\n", "has anything to learn"),
    ],
)
def test_data_that_cannot_be_used_is_told(
    name: str, content: str, says: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(RequestError, match=says) as caught:
        tokenised(tokenizer_folder, file)
    assert all((problem.key or "").startswith("data.") for problem in caught.value.problems)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    as_jsonl(tmp_path / "chats.jsonl", CHATS)
    with pytest.raises(RequestError, match="row 1: rows with messages need a chat template"):
        tokenised(tmp_path / "tokenizer", tmp_path / "chats.jsonl")


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text('{"model_type": "llama"}')
    as_jsonl(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(RequestError, match=r"the tokenizer of .*bare cannot be loaded"):
        tokenised(tmp_path / "bare", tmp_path / "texts.jsonl")


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Job:
    as_jsonl(tmp_path / "chats.jsonl", CHATS)
    data = {"train": str(tmp_path / "chats.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")}
    return validate_job({"model": {"name_or_path": str(tiny_model)}, "data": data})


def with_data(job: Job, **changes: Any) -> Job:
    return job.model_copy(update={"data": job.data.model_copy(update=changes)})


def is_cached(job: Job) -> bool:
    assert job.data.cache_dir is not None
    return cached(Request(job=job, cache=Path(job.data.cache_dir))) is not None


def carried_out(job: Job) -> Prepared:
    assert job.data.cache_dir is not None
    return run_request(Request(job=job, cache=Path(job.data.cache_dir)), lambda **_: None)


def test_text_that_looks_like_json_or_a_number_is_learned_as_it_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    answers: list[Any] = ['{"a": 1}', "1.50", "null", '"quoted"', [{"type": "text", "text": "parts"}]]
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    as_jsonl(tmp_path / "chats.jsonl", [{"messages": messages} for messages in turns])
    facts = tokenised(tokenizer_folder, tmp_path / "chats.jsonl")
    learned = [runs for _, runs in sequences(facts, tokenizer_folder)]
    assert learned[:4] == [[f"{answer}<|end|>"] for answer in answers[:4]]


def test_csv_cells_that_look_missing_are_learned(tokenizer_folder: Path, tmp_path: Path) -> None:
    cells = ["None", "NA", "null", "007", "1.50"]
    as_csv(tmp_path / "pairs.csv", [{"prompt": "null ", "completion": cell} for cell in cells])
    facts = tokenised(tokenizer_folder, tmp_path / "pairs.csv")
    assert [text for text, _ in sequences(facts, tokenizer_folder)] == [f"null {cell}<|end|>" for cell in cells]


def test_what_reading_found_is_in_the_facts(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    as_jsonl(file, [{"text": "alpha"}] * 7 + [{"other": "beta"}])
    facts = tokenised(tokenizer_folder, file, eval=0.25)
    assert facts.eval is not None
    assert facts.shared_rows in (1, 2)
    assert [note.split(" (")[0].split(" of ", 1)[1] for note in facts.notes] in (
        ["6 rows of data.train have no text"],
        ["2 rows of data.eval have no text"],
    )


@pytest.fixture
def mixed() -> Rows:
    """Rows for which datasets takes its Json type: a content that is a text in one row and a list in another."""
    parts = [{"type": "text", "text": "beta"}]
    return [
        {"messages": [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": parts}]},
        {"messages": [{"role": "user", "content": '"quoted"'}, {"role": "assistant", "content": '{"a": 1}'}]},
        {"messages": [{"role": "user", "content": "1.50"}, {"role": "assistant", "content": "null"}]},
    ]


def test_files_of_a_hub_set_are_read_as_local_ones_are(mixed: Rows, tmp_path: Path) -> None:
    """A folder stands in for the hub: datasets finds files and splits in both in the same way."""
    as_jsonl(tmp_path / "train.jsonl", mixed)
    as_jsonl(tmp_path / "test.jsonl", mixed[2:])

    def rows(split: str) -> Rows:
        return [dict(row) for reader in hub_readers(str(tmp_path), None, split) for row in reader.rows()]

    assert rows("train") == mixed
    assert rows("test") == mixed[2:]
    assert rows("train[1:]+test") == mixed[1:] + mixed[2:]
    assert sum(reader.summary().rows for reader in hub_readers(str(tmp_path), None, "train[:2]")) == 2
    with pytest.raises(BadFile) as caught:
        rows("validation")
    assert caught.value.hint == "data.split or data.eval_split: train, test"


def test_the_share_that_is_held_out_is_that_of_datasets() -> None:
    import datasets

    for rows, share, seed in ((10, 0.1, 0), (57, 0.02, 42), (100, 0.5, 7)):
        data = datasets.Dataset.from_dict({"row": list(range(rows))})
        parts = data.train_test_split(test_size=max(1, round(rows * share)), seed=seed)
        assert set(held_out_rows(rows, share, seed).nonzero()[0].tolist()) == set(parts["test"]["row"])


def test_folders_of_save_to_disk_are_read(mixed: Rows, tmp_path: Path) -> None:
    import datasets

    plain = datasets.Dataset.from_list([{"text": text, "n": 1} for text in ("007", "null", '{"a": 1}')])
    plain.select([2, 0]).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": plain, "test": plain.select([1])}).save_to_disk(str(tmp_path / "two"))

    def rows(name: str, split: str = "train") -> Rows:
        return [dict(row) for row in saved_reader(tmp_path / name, split).rows()]

    assert rows("one") == [{"text": '{"a": 1}'}, {"text": "007"}]
    assert rows("two", "test") == [{"text": "null"}]
    with pytest.raises(BadFile, match="has no split validation"):
        rows("two", "validation")

    as_jsonl(tmp_path / "chats.jsonl", mixed)
    stored = datasets.load_dataset("json", data_files=str(tmp_path / "chats.jsonl"), split="train")
    stored.save_to_disk(str(tmp_path / "json"))
    found = rows("json")
    assert [row["messages"][1]["content"] for row in found] == [
        [{"type": "text", "text": "beta"}],
        '{"a": 1}',
        "null",
    ]
    assert found[2]["messages"][0]["content"] == "1.50"
    (note,) = saved_reader(tmp_path / "json", "train").summary().notes
    assert "stores messages as datasets' Json type" in note


def test_what_is_cached_starts_no_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []
    first = prepare(job, told.append)
    assert [progress["message"] for progress in told] == ["measuring the model", "tokenising data.train"]

    def trip(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", trip)
    assert prepare(job, told.append) == first
    assert len(told) == 2


def test_what_has_changed_is_not_taken_from_the_cache(job: Job, tiny_model: Path, tmp_path: Path) -> None:
    carried_out(job)
    assert is_cached(job)
    assert not is_cached(with_data(job, max_length=32))
    assert not is_cached(with_data(job, eval=0.5))
    assert not is_cached(with_data(job, format="messages"))
    assert is_cached(job.model_copy(update={"train": job.train.model_copy(update={"seed": 7})}))

    file = Path(str(job.data.train))
    before = file.read_text()
    file.write_text(before + json.dumps(CHATS[0]) + "\n")
    assert not is_cached(job)
    assert carried_out(job).data.train.rows == 4

    copied = tmp_path / "model"
    shutil.copytree(tiny_model, copied)
    moved = job.model_copy(update={"model": job.model.model_copy(update={"name_or_path": str(copied)})})
    data = carried_out(moved).data
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    assert not is_cached(moved)
    assert carried_out(moved).data.fingerprint != data.fingerprint


def test_the_limit_of_the_cache_removes_data_that_was_not_used_for_long(job: Job, tmp_path: Path) -> None:
    first = Path(carried_out(job).data.train.folder).parent
    before = time.time() - 3600
    os.utime(first / "facts.json", (before, before))
    told: list[str] = []
    limited = Request(job=with_data(job, max_length=32, cache_limit_gb=1e-7), cache=tmp_path / "cache")
    second = run_request(limited, lambda **progress: told.append(progress["message"]))
    assert [entry.name for entry in (tmp_path / "cache/data").iterdir()] == [second.data.fingerprint]
    assert told[-2:] == [
        "removed unused cache entries: 1, 0.0 GB (data.cache_limit_gb)",
        "the cache takes 0.0 GB, more than data.cache_limit_gb: the rest is in use",
    ]


def test_the_measured_model_is_the_real_one(job: Job, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    facts = carried_out(job).model
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert (facts.layers, facts.hidden_size, facts.max_positions) == (2, 32, 128)
    assert (facts.tied_embeddings, facts.has_chat_template, facts.supports_gradient_checkpointing) == (True,) * 3


def test_a_contradiction_with_the_model_is_told_before_tokenising(job: Job, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="4096 is more than the 128 positions") as caught:
        prepare(with_data(job, max_length=4096), lambda _: None)
    assert caught.value.problems[0].hint == "use at most 128"
    assert not (tmp_path / "cache/data").exists()


def test_a_request_error_crosses_from_the_process(job: Job) -> None:
    Path(str(job.data.train)).write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(RequestError, match="row 1: a message needs role and content") as caught:
        prepare(job, lambda _: None)
    assert caught.value.problems[0].key == "data.train"


ONE = "import sys; from launcher.prepare.__main__ import main; sys.exit(main())"


def test_two_processes_at_once_leave_one_good_cache(job: Job, tmp_path: Path) -> None:
    request = Request(job=job, cache=tmp_path / "cache")
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(request.model_dump_json())
        process.stdin.close()
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append(json.loads(process.stdout.read().splitlines()[-1])["prepared"])
        process.stdout.close()
        assert process.wait(TIME_LIMIT_SECONDS) == 0
    assert answers[0] == answers[1]

    left = sorted(path.relative_to(tmp_path / "cache").parts for path in (tmp_path / "cache").glob("*/*"))
    assert [part[0] for part in left] == ["data", "models"]
    found = prepare(job, lambda _: None)
    assert found.model_dump(mode="json") == answers[0]
    assert len(TokenStore(Path(found.data.train.folder))) == 3
