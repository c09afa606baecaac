"""From files to token stores: what is learned, what is left out and why, and what the plan is told of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from launcher.errors import RequestError
from launcher.job import validate_job
from launcher.plan.facts import DataFacts
from launcher.plan.length import check_token_ids
from launcher.prepare.request import Request, cached, carry_out
from launcher.prepare.sources import DataSource
from launcher.prepare.tokenise import TextRequest, tokenise
from launcher.token_store import TokenStore
from tests.tiny_models import make_tiny_tokenizer
from tests.unit.inputs import model_facts
from tests.unit.prepare.chats import TEMPLATES, call, chat, tool

pytestmark = pytest.mark.local

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with a post-processor that appends its end token."""
    folder = tmp_path_factory.mktemp("ending")
    tokenizer = make_tiny_tokenizer()
    post = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(folder)
    return folder


def tokenised(folder: Path, rows: Rows, file: Path, max_length: int = 1000, **changes: Any) -> DataFacts:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = TextRequest(DataSource((file,), "json"), None, "auto", max_length, "train", seed=3, **changes)
    return tokenise(request, folder, file.with_suffix(".tokens"), False, lambda **_: None)


def learned(facts: DataFacts, folder: Path) -> list[str]:
    """The learned text of each sequence."""
    tokenizer, store = AutoTokenizer.from_pretrained(folder), TokenStore(Path(facts.train.folder))
    return [tokenizer.decode(tokens[mask == 1]) for tokens, mask in (store[i] for i in range(len(store)))]


@pytest.mark.parametrize("name", ["plain", "ending"])
def test_an_end_that_the_tokenizer_appends_is_learned(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    pairs = tokenised(folder, [{"prompt": "alpha ->", "completion": " beta"}] * 4, tmp_path / "pairs.jsonl")
    assert (learned(pairs, folder), pairs.train.targets) == ([" beta<|end|>"] * 4, 8)
    texts = tokenised(folder, [{"text": "alpha beta"}] * 4, tmp_path / "texts.jsonl")
    assert (set(learned(texts, folder)), texts.train.targets) == ({"alpha beta<|end|>"}, 8)


def test_an_end_alone_in_the_last_piece_is_kept(plain: Path, tmp_path: Path) -> None:
    tokens = len(AutoTokenizer.from_pretrained(plain)("alpha beta gamma delta")["input_ids"])
    facts = tokenised(plain, [{"text": "alpha beta gamma delta"}], tmp_path / "texts.jsonl", max_length=tokens)
    assert (facts.train.sequences, facts.train.dropped, facts.train.longest) == (2, 0, tokens - 1)
    found = learned(facts, plain)
    assert "".join(found) == "alpha beta gamma delta<|end|>"
    assert found[1].endswith("<|end|>")


def test_rows_that_are_left_out_are_counted_by_reason(plain: Path, tmp_path: Path) -> None:
    rows: Rows = [
        {"messages": chat("alpha", "beta"), "score": 3},
        {"messages": chat("alpha")},
        {"messages": chat("alpha", "")},
        {"messages": [*chat("alpha"), {"role": "assistant", "content": None}]},
        {"messages": []},
        {"messages": chat("alpha " * 30, "beta")},
    ]
    facts = tokenised(plain, rows, tmp_path / "chats.jsonl", max_length=20)
    assert (facts.train.sequences, facts.train.dropped, facts.train.cut) == (1, 5, 1)
    assert facts.train.dropped_because == {
        "have only empty assistant turns": 2,
        "have no assistant turn": 1,
        "are empty": 1,
        "have nothing to learn within data.max_length": 1,
    }
    assert "columns that are not used: score" in facts.train.notes


@pytest.mark.parametrize(
    ("rows", "says", "hint"),
    [
        ([{"messages": chat("alpha")}] * 2, "none of 2 rows, .*: 2 have no assistant turn$", "role assistant"),
        ([{"messages": chat("alpha", "")}], "1 have only empty assistant turns$", "data.format"),
        (
            [{"messages": chat("alpha " * 30, "beta")}],
            "1 have nothing to learn within data.max_length$",
            "raise data.max",
        ),
        ([{"prompt": "x", "completion": ""}], "1 are empty$", "data.format"),
    ],
)
def test_nothing_to_learn_has_its_cause(rows: Rows, says: str, hint: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        tokenised(plain, rows, tmp_path / "chats.jsonl", max_length=20)
    (problem,) = caught.value.problems
    assert problem.key == "data.train"
    assert hint in (problem.hint or "")
    assert re.search(says, problem.message)


def test_an_unknown_role_is_refused_with_its_row(plain: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat("a", "b")}, {"messages": [{"role": "gpt", "content": "x"}]}]
    with pytest.raises(RequestError, match="row 2: role gpt, wanted system, user, assistant, tool"):
        tokenised(plain, rows, tmp_path / "chats.jsonl")


def test_the_template_of_the_job_takes_the_place_of_the_tokenizers(plain: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat("q1", "a1", "q2", "a2")}]
    facts = tokenised(plain, rows, tmp_path / "chats.jsonl", chat_template=TEMPLATES["chatml"])
    assert learned(facts, plain) == ["a1<|im_end|>\na2<|im_end|>\n"]
    assert facts.chat_template == TEMPLATES["chatml"]
    own = tokenised(plain, rows, tmp_path / "own.jsonl", learn="last")
    assert (learned(own, plain), own.chat_template) == (["a2<|end|>"], None)


def test_variables_of_the_job_reach_the_template(plain: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat("q", "a")}]
    thinking = {"chat_template": TEMPLATES["qwen3"]}
    facts = tokenised(plain, rows, tmp_path / "on.jsonl", **thinking)
    assert learned(facts, plain) == ["<think>\n\n</think>\n\na<|im_end|>\n"]
    off = {**thinking, "chat_template_kwargs": {"enable_thinking": False}}
    assert learned(tokenised(plain, rows, tmp_path / "off.jsonl", **off), plain) == ["a<|im_end|>\n"]


def test_what_a_user_should_know_of_a_template_is_noted(plain: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat("q", "<think>hm</think>a")}]
    begin = {"chat_template_kwargs": {"bos_token": ""}}
    for name, words in (
        ("no_end", "writes no end of turn after the last answer of 1 conversations"),
        ("deepseek_r1", "the generation prompt ends in '<think>\\n'"),
        ("llama3", "tokenised with 26 Jul 2024"),
    ):
        facts = tokenised(plain, rows, tmp_path / f"{name}.jsonl", chat_template=TEMPLATES[name], **begin)
        assert words in " ".join(facts.train.notes)
    reasoning = tokenised(plain, rows, tmp_path / "cut.jsonl", chat_template=TEMPLATES["deepseek_r1"], **begin)
    assert "leaves out part of what the assistant says" in " ".join(reasoning.train.notes)
    assert tokenised(plain, [{"messages": chat("q", "a")}], tmp_path / "ok.jsonl").train.notes == ()


def test_tools_in_a_file(plain: Path, tmp_path: Path) -> None:
    calls = [
        call(arguments='{"city": "Paris"}'),
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"messages": [*chat("q"), *calls], "tools": json.dumps([tool()])}]
    facts = tokenised(plain, rows, tmp_path / "calls.jsonl", chat_template=TEMPLATES["qwen25"])
    wanted = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\na<|im_end|>\n'
    assert learned(facts, plain) == [wanted]
    with pytest.raises(RequestError, match=r"row 1: the chat template of plain\d* writes no tool_calls \(message 2\)"):
        tokenised(plain, rows, tmp_path / "again.jsonl")


def test_token_ids_beyond_the_embeddings_are_refused(plain: Path, tmp_path: Path) -> None:
    facts = tokenised(plain, [{"text": "alpha"}], tmp_path / "texts.jsonl")
    largest = facts.train.largest_token
    assert largest == max(AutoTokenizer.from_pretrained(plain)("alpha")["input_ids"])
    check_token_ids(facts, model_facts(vocab_size=largest + 1))
    with pytest.raises(RequestError, match=f"token {largest}, and the model has {largest} embeddings"):
        check_token_ids(facts, model_facts(vocab_size=largest))


def test_the_cache_knows_the_template_and_what_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    file, template = tmp_path / "chats.jsonl", tmp_path / "chat.jinja"
    file.write_text(json.dumps({"messages": chat("q1", "a1", "q2", "a2")}) + "\n")
    template.write_text(TEMPLATES["chatml"])

    def request(**data: Any) -> Request:
        job = {"model": {"name_or_path": str(tiny_model)}, "data": {"train": str(file), "max_length": 64, **data}}
        return Request(job=validate_job(job), cache=tmp_path / "cache")

    first = request(chat_template=str(template))
    prepared = carry_out(first, lambda **_: None)
    assert prepared.data.chat_template == TEMPLATES["chatml"]
    assert cached(first) == prepared
    assert cached(request(chat_template=TEMPLATES["chatml"])) == prepared
    assert cached(request()) is None
    assert cached(request(chat_template=str(template), learn="last")) is None
    assert cached(request(chat_template=str(template), chat_template_kwargs={"a": 1})) is None
    template.write_text(TEMPLATES["qwen25"])
    assert cached(first) is None
