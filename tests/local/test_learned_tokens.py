"""Learned tokens, decoded: with tokenizers of each kind, and for random conversations in every chat template."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from launcher.prepare import encode
from launcher.prepare.conversations import Reason
from launcher.prepare.encode import Encoder
from launcher.prepare.row_formats import Example, Reader
from launcher.prepare.row_values import BadRow
from launcher.prepare.template_environment import DATE
from launcher.prepare.text_tokenizer import is_sendable, text_tokenizer
from tests.unit.prepare.chats import MARKERS, TEMPLATES, call, chat, template, tool

pytestmark = pytest.mark.local

WORDS = ["alpha beta gamma delta epsilon positive negative"] * 10
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


def byte_level(post: Any = None, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """GPT-2's kind: spaces belong to the word that follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one in added])
    tokenizer.post_processor = post or processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece(post: Any = None) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space is put in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    if post:
        tokenizer.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def runs(tokenizer: Any, tokens: list[int], learned: list[int]) -> list[str]:
    """The text of each run of learned tokens."""
    found: list[list[int]] = []
    for i, (token, bit) in enumerate(zip(tokens, learned, strict=True)):
        if bit and (i == 0 or not learned[i - 1]):
            found.append([])
        if bit:
            found[-1].append(token)
    return [tokenizer.decode(run) for run in found]


def encoded(
    tokenizer: Any, example: Example, max_length: int = 1000, divide: bool = False
) -> list[tuple[str, list[str]]]:
    """For each sequence its text and the text of its learned runs."""
    one = Encoder(tokenizer, max_length, divide).encode([example])[0]
    return [(tokenizer.decode(tokens), runs(tokenizer, tokens, learned)) for tokens, learned in one.sequences]


def pair(prompt: str, completion: str) -> Example:
    example = Reader("prompt-completion", None).read({"prompt": prompt, "completion": completion})
    assert isinstance(example, Example)
    return example


def whole(text: str) -> Example:
    return Example(text, ((0, len(text)),))


@pytest.mark.parametrize("post", [None, BOTH], ids=["nothing added", "both ends added"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("alpha ->", " beta"),
        ("alpha: ", "positive"),
        ("alpha:", "positive"),
        ("alpha:  ", "  positive"),
        ("alpha\n", "\npositive"),
        ("alp", "ha"),
        ("", "beta"),
        ("alpha: ", "1.50 é 漢字 \U0001f600"),
        ("alpha: ", "beta</s>"),
        ("alpha: ", "beta</s>\n"),
        ("<s>alpha: ", "beta"),
    ],
)
def test_a_completion_is_learned_from_its_first_letter_to_its_end(prompt: str, completion: str, post: Any) -> None:
    tokenizer = byte_level(post)
    answer = completion.rstrip().removesuffix("</s>") if "</s>" in completion else completion
    first = "<s>" if post or prompt.startswith("<s>") else ""
    assert encoded(tokenizer, pair(prompt, completion)) == [
        (f"{first}{prompt.removeprefix('<s>')}{answer}</s>", [f"{answer}</s>"])
    ]


@pytest.mark.parametrize(("prompt", "completion"), [("alpha: ", "positive"), ("alpha:", " positive"), ("alp", "ha")])
@pytest.mark.parametrize("post", [None, BOTH])
def test_a_completion_behind_a_space_in_sentencepiece(prompt: str, completion: str, post: Any) -> None:
    tokenizer = sentencepiece(post)
    one = Encoder(tokenizer, 100, False).encode([pair(prompt, completion)])[0]
    ((tokens, learned),) = one.sequences
    text = [tokenizer.convert_ids_to_tokens(t) for t in tokens]
    assert "".join(text).replace("▁", " ").removeprefix("<s>").strip() == f"{prompt}{completion}</s>"
    assert "".join(t for t, bit in zip(text, learned, strict=True) if bit).replace("▁", " ") == f"{completion}</s>"


class CalledInPython(PreTrainedTokenizerFast):
    """A tokenizer with Python code of its own."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        return super().__call__(*given, **options)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_library_gives_the_tokens_that_transformers_gives(make: Callable[..., Any], split: bool) -> None:
    tokenizer = make(BOTH)
    tokenizer.split_special_tokens = split
    tokenizer.backend_tokenizer.enable_truncation(3)
    texts = ["alpha beta", " alpha", "<s>alpha</s> beta", "", "é 漢字 \U0001f600\n\n", "x" * 50]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    whole = tokenizer(texts[2], add_special_tokens=False, return_offsets_mapping=True)
    ends = tokenizer("alpha")["input_ids"]

    own = CalledInPython(tokenizer_object=tokenizer.backend_tokenizer, split_special_tokens=split)
    library, called = text_tokenizer(tokenizer), text_tokenizer(own)
    sent = pickle.loads(pickle.dumps(library))
    assert (is_sendable(library), is_sendable(called)) == (True, False)
    for one in (library, called, sent):
        assert one.ids(texts) == expected
        assert one.ids([]) == []
        assert one.ids_and_offsets(texts[2]) == (whole["input_ids"], whole["offset_mapping"])
        assert one.ids_with_ends("alpha") == ends


def test_the_prompt_is_tokenised_as_it_is_in_use() -> None:
    tokenizer = byte_level()
    prompt = tokenizer("alpha: ")["input_ids"]
    ((tokens, _),) = Encoder(tokenizer, 100, False).encode([pair("alpha: ", "positive")])[0].sequences
    assert tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("post", [None, BOTH])
@pytest.mark.parametrize("text", ["alpha beta", "<s>alpha beta", "alpha beta</s>", "<s>alpha beta</s>\n"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_special_tokens_are_never_doubled(make: Callable[..., Any], text: str, post: Any) -> None:
    tokenizer = make(post)
    ((tokens, learned),) = Encoder(tokenizer, 100, True).encode([whole(text)])[0].sequences
    assert tokens.count(0) == (1 if post or "<s>" in text else 0)
    assert (tokens.count(1), tokens[-1], learned[-1]) == (1, 1, 1)
    assert sum(learned[1:]) == len(tokens) - 1


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("word", ["alpha beta, 1.50 é 漢字\n\n", "x", "  \n", "ab</s> <s>", "漢字"])
def test_long_texts_have_the_tokens_of_the_whole(
    word: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    encoder = Encoder(tokenizer, 100_000, True)
    example = Example(word * 600, ((0, len(word) * 300),))
    expected = encoder.encode([example, whole("gamma")])
    asked: list[str] = []
    plain = Encoder._plain
    monkeypatch.setattr(encode, "LONGEST_TEXT", 500)
    monkeypatch.setattr(Encoder, "_plain", lambda self, text: (asked.append(text), plain(self, text))[1])
    assert encoder.encode([example, whole("gamma")]) == expected
    if word.startswith("alpha") and make is byte_level:
        assert len(asked) > 20
        assert max(map(len, asked)) < 5000


@pytest.mark.parametrize("length", range(1, 30))
def test_the_last_learned_token_of_a_text_is_its_end(length: int) -> None:
    tokenizer = byte_level()
    found = Encoder(tokenizer, 8, True).encode([whole("x" * length)])[0]
    tokens = [token for sequence, _ in found.sequences for token in sequence]
    assert tokenizer.decode(tokens) == "x" * length + "</s>"
    assert all(2 <= len(sequence) <= 8 for sequence, _ in found.sequences)
    assert (found.sequences[-1][0][-1], found.sequences[-1][1][-1]) == (1, 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes(name: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES[name]
    ours = template(name, date_string="1 May 2020") if name == "llama3" else template(name)
    more = {"date_string": "1 May 2020"} if name == "llama3" else {}
    messages = [
        {"role": "user", "content": "q <b>"},
        {"role": "assistant", "content": "a\n", "reasoning_content": "hm"},
    ]
    example = Reader("messages", ours).read({"messages": messages})
    assert isinstance(example, Example)
    if name == "parts":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    if name == "harmony":
        before, date, after = example.text.partition(f"{DATE:%Y-%m-%d}")
        assert date
        assert text.startswith(before)
        assert text.endswith(after)
    else:
        assert text == example.text


# Random conversations. What each template writes of an assistant turn is said here a second time, in Python.


class Where(NamedTuple):
    """Is the turn the last message, behind the last question, right behind a tool's result?"""

    last: bool
    later: bool
    after_tool: bool


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(form: str, join: str = "") -> Callable[[dict[str, Any]], str]:
    def written(turn: dict[str, Any]) -> str:
        calls = [one["function"] for one in turn.get("tool_calls", ())]
        return join.join(form % (one["name"], _json(one["arguments"])) for one in calls)

    return written


_QWEN = _calls('<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>', "\n")


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _qwen25(turn: dict[str, Any], _where: Where) -> str:
    calls = _QWEN(turn)
    return _content(turn) + ("\n" if calls and _content(turn) else "") + calls + "<|im_end|>\n"


def _qwen3(turn: dict[str, Any], where: Where) -> str:
    content, calls = _content(turn), _QWEN(turn)
    thoughts = turn.get("reasoning_content") or ""
    if "reasoning_content" not in turn and "</think>" in content:
        thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    head = ""
    if where.later and (where.last or thoughts):
        head, content = f"<think>\n{thoughts.strip(chr(10))}\n</think>\n\n", content.lstrip("\n")
    return head + content + ("\n" if calls and content else "") + calls + "<|im_end|>\n"


def _plain(end: str, trim: bool = False, last_end: str | None = None) -> Callable[..., str]:
    def written(turn: dict[str, Any], where: Where) -> str:
        content = _content(turn).strip() if trim else _content(turn)
        return content + (last_end if where.last and last_end is not None else end)

    return written


def _r1(turn: dict[str, Any], where: Where) -> str:
    if "tool_calls" in turn:
        form = "<｜call｜>function<｜sep｜>%s\n```json\n%s\n```<｜/call｜>"
        return "<｜calls｜>" + _calls(form)(turn) + "<｜/calls｜></s>"
    return (_content(turn) if where.after_tool else _content(turn).split("</think>")[-1]) + "</s>"


def _harmony(turn: dict[str, Any], where: Where) -> str:
    if "tool_calls" in turn:
        return _calls(" to=functions.%s<|channel|>commentary json<|message|>%s<|call|>")(turn)
    thoughts = turn.get("reasoning_content") if where.last else None
    analysis = f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant" if thoughts else ""
    return f"{analysis}<|channel|>final<|message|>{_content(turn)}{'<|return|>' if where.last else '<|end|>'}"


def _mistral(turn: dict[str, Any], _: Where) -> str:
    if "tool_calls" in turn:
        return "[TOOL_CALLS] [" + _calls('{"name": "%s", "arguments": %s, "id": "abcdefghi"}')(turn) + "]</s>"
    return f" {_content(turn).strip()}</s>"


def _llama3(turn: dict[str, Any], _where: Where) -> str:
    calls = _calls('{"name": "%s", "parameters": %s}')(turn)
    return (calls or _content(turn).strip()) + "<|eot_id|>"


def _generation(turn: dict[str, Any], _where: Where) -> str:
    calls = "".join("<tool_call>" + _json(one["function"]) + "</tool_call>" for one in turn.get("tool_calls", ()))
    return _content(turn).strip() + calls + "<|im_end|>"


def _always_prompt(turn: dict[str, Any], _where: Where) -> str:
    return _calls("[%s: %s]")(turn) + _content(turn) + "<|eot_id|>"


ANSWERS: dict[str, Callable[..., str]] = {
    "always_prompt": _always_prompt,
    "chatml": _plain("<|im_end|>\n"),
    "deepseek_r1": _r1,
    "end_only": _plain("", last_end="</s>"),
    "gemma": _plain("<end_of_turn>\n", trim=True),
    "generation": _generation,
    "harmony": _harmony,
    "llama3": _llama3,
    "mistral": _mistral,
    "no_end": _plain("\n"),
    "no_prompt": _plain("<|end|>"),
    "no_tools": _plain("<|eot_id|>", trim=True),
    "only_user_and_assistant": _plain("</s>"),
    "parts": _plain("<|im_end|>\n"),
    "phi": _plain("<|end|>\n", last_end="<|end|>\n</s>"),
    "qwen25": _qwen25,
    "qwen3": _qwen3,
}
WITH_CALLS = ("always_prompt", "generation", "harmony", "llama3", "mistral", "qwen25", "qwen3")
TEXT = st.lists(
    st.sampled_from(
        ["alpha", "beta", " ", "\n", "  ", "é", "漢", "\U0001f600", '{"a": 1}', "1.50", "null", "'", "\\", "\r\n"]
    )
    | st.sampled_from([m for m in MARKERS if m not in ("<think>", "</think>")])
    | st.sampled_from(
        ["<think>\nhm\n</think>\n\n", "assistant\n", "user", "### Assistant:\n", "{{ x }}", "{% if %}", "\ufffd"]
    ),
    max_size=6,
).map("".join)
FILLED = TEXT.filter(lambda text: bool(text.strip()))


def _as_parts(text: str, draw: Callable[..., Any]) -> Any:
    if not draw(st.booleans()):
        return text
    at = draw(st.integers(0, len(text)))
    return [{"type": "text", "text": text[:at]}, {"type": "text", "text": text[at:]}]


@st.composite
def conversations(draw: Callable[..., Any]) -> list[dict[str, Any]]:
    """Turns of system, user, assistant and tool, in an order that people use."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(FILLED)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": _as_parts(draw(TEXT), draw)})
        if draw(st.integers(0, 3)) == 0:
            arguments = draw(st.dictionaries(st.sampled_from(["a", "b", "city"]), FILLED | st.integers(), max_size=2))
            messages.append(call("get", arguments))
            if draw(st.booleans()):
                messages[-1]["content"] = draw(FILLED)
            messages.append({"role": "tool", "content": draw(FILLED)})
        answer: dict[str, Any] = {"role": "assistant", "content": _as_parts(draw(FILLED), draw)}
        if draw(st.integers(0, 4)) == 0:
            answer["reasoning_content"] = draw(FILLED)
        messages.append(answer)
    if draw(st.integers(0, 4)) == 0:
        messages.append({"role": "user", "content": draw(FILLED)})
    return messages


def expected(name: str, messages: list[dict[str, Any]]) -> Iterator[str]:
    """What the model should learn to write, turn by turn."""
    questions = [
        i
        for i, m in enumerate(messages)
        if m["role"] == "user"
        and not (_content(m).startswith("<tool_response>") and _content(m).endswith("</tool_response>"))
    ]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            where = Where(i == len(messages) - 1, i > questions[-1], messages[i - 1]["role"] == "tool")
            written = ANSWERS[name](message, where)
            if (
                name != "qwen3" or written != "<|im_end|>\n"
            ):  # qwen3 leaves out all that the turn says: it is as good as empty
                yield written


TOKENIZER = byte_level(added=tuple(m for m in MARKERS if m not in ("<s>", "</s>")))
ENCODER = Encoder(TOKENIZER, 100_000, False)
READERS = {name: Reader("messages", template(name)) for name in ANSWERS}


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_exactly_what_the_assistant_writes_is_learned(name: str, messages: list[dict[str, Any]]) -> None:
    called = any("tool_calls" in message for message in messages)
    row = {"messages": messages, "tools": [tool()] if called and name in ("qwen25", "qwen3", "llama3") else None}
    try:
        example = READERS[name].read(row)
    except BadRow:
        refuses = ("gemma", "only_user_and_assistant")
        if name in refuses or (called and name not in WITH_CALLS):
            return
        raise
    wanted = list(expected(name, messages))
    if not wanted:
        assert example is Reason.NOT_FOUND
        return
    assert isinstance(example, Example), example
    ((tokens, learned),) = ENCODER.encode([example])[0].sequences
    assert runs(TOKENIZER, tokens, learned) == wanted
    assert TOKENIZER.decode(tokens) == example.text


def test_a_row_without_answers_is_not_learned() -> None:
    assert READERS["chatml"].read({"messages": chat("q", " ")}) is Reason.EMPTY_ANSWERS
