"""Rows become text and exactly the spans that are learned."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.prepare.chat_template import ChatTemplate
from launcher.prepare.conversations import Reason
from launcher.prepare.row_formats import Example, Reader, detect_format, unused_columns
from launcher.prepare.row_values import BadRow
from tests.unit.prepare.chats import PLAIN, chat, learned, plain

Row = dict[str, Any]


def read(row: Row, kind: str, template: ChatTemplate | None = None, **changes: Any) -> Example | Reason:
    return Reader(kind, template or plain(), **changes).read(row)


def bare(row: Row, kind: str, **changes: Any) -> Example:
    example = Reader(kind, None, **changes).read(row)
    assert isinstance(example, Example)
    return example


def text(found: Example | Reason) -> str:
    assert isinstance(found, Example), found
    return found.text


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages"], "messages"),
        (["conversations", "id"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output", "text"], "instruction"),
        (["text"], "text"),
        (["messages", "text"], "messages"),
    ],
)
def test_formats_are_detected_from_the_columns(columns: list[str], kind: str) -> None:
    assert detect_format(columns) == kind


@pytest.mark.parametrize("columns", [[], ["prompt"], ["Text"], ["question", "answer"]])
def test_unknown_columns_are_rejected_with_the_needed_ones(columns: list[str]) -> None:
    with pytest.raises(BadRow, match="prompt-completion: prompt, completion") as caught:
        detect_format(columns)
    assert all(column in str(caught.value) for column in columns)


def test_unused_columns_are_named() -> None:
    assert unused_columns(["messages", "tools", "system", "id", "history", "score"], "messages") == ["history", "score"]
    assert unused_columns(["instruction", "output", "history", "system"], "instruction") == []
    assert unused_columns(["text", "system"], "text") == ["system"]


def test_assistant_turns_are_learned_with_their_ends() -> None:
    example = read({"messages": chat("q1", "a1", "q2", "a2")}, "messages")
    assert text(example) == "<user>q1<end><assistant>a1<end><user>q2<end><assistant>a2<end>"
    assert learned(example) == ["a1<end>", "a2<end>"]
    assert isinstance(example, Example)
    assert (example.complete, example.partly) == (True, False)


def test_turns_around_turns_without_text_are_learned_alone() -> None:
    """The text between two markers is the same here, with one message after it and with two."""
    example = read({"messages": [{"role": "assistant", "content": text} for text in ("", "a", "", "b")]}, "messages")
    assert text(example) == "<assistant><end><assistant>a<end><assistant><end><assistant>b<end>"
    assert learned(example) == ["a<end>", "b<end>"]


CONTENT = st.text("ab <>\n", max_size=6)


@given(
    turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=6)
)
def test_exactly_the_assistant_turns_are_learned(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = [content + "<end>" for role, content in turns if role == "assistant" and content.strip()]
    example = read({"messages": messages}, "messages")
    if not wanted:
        assert isinstance(example, Reason)
        return
    assert isinstance(example, Example)
    assert learned(example) == wanted
    for (start, _), answer in zip(example.spans, wanted, strict=True):
        assert example.text[:start].endswith("<assistant>")
        assert example.text.startswith(answer, start)


def test_tools_are_passed_to_the_template() -> None:
    source = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
    row = {"messages": chat("q", "a"), "tools": [{"name": "t1", "default": None}]}
    for tools in (row["tools"], '[{"name": "t1"}]', ['{"name": "t1"}']):
        example = read({**row, "tools": tools}, "messages", ChatTemplate(source, "tools"))
        assert text(example).startswith('[{"name": "t1"}]<user>')
        assert learned(example) == ["a<end>"]
    for none in (None, [], "", "[]", "null"):
        assert text(read({**row, "tools": none}, "messages")).startswith("<user>")


def test_sharegpt_conversations() -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q2"), ("assistant", "a2")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    example = read(row, "messages")
    assert text(example) == "<system>s<end><user>q<end><assistant>a<end><user>q2<end><assistant>a2<end>"
    assert learned(example) == ["a<end>", "a2<end>"]


def test_conversations_may_be_messages_or_json_text() -> None:
    assert learned(read({"conversations": chat("q", "a")}, "messages")) == ["a<end>"]
    row = {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "1.50"}]'}
    assert learned(read(row, "messages")) == ["1.50<end>"]


def test_a_system_column_is_the_first_turn() -> None:
    row = {"conversations": chat("q", "a"), "system": "You are kappa."}
    assert text(read(row, "messages")).startswith("<system>You are kappa.<end><user>q")
    assert text(read({**row, "system": None}, "messages")).startswith("<user>q")
    row = {"prompt": chat("q"), "completion": chat("q", "a")[1:], "system": "S"}
    assert learned(read(row, "prompt-completion")) == ["a<end>"]
    with pytest.raises(BadRow, match="a system column and a turn of role system"):
        read({"messages": [{"role": "system", "content": "s"}, *chat("q", "a")], "system": "S"}, "messages")


def test_variables_of_a_row_are_passed_to_the_template() -> None:
    source = "{% if thinking %}<yes>{% endif %}" + PLAIN
    row = {"messages": chat("q", "a"), "chat_template_kwargs": {"thinking": True, "other": None}}
    template = ChatTemplate(source, "own", template_kwargs={"thinking": False})
    assert text(read(row, "messages", template)).startswith("<yes><user>")
    assert text(read({"messages": chat("q", "a")}, "messages", template)).startswith("<user>")
    assert text(read({**row, "chat_template_kwargs": '{"thinking": true}'}, "messages", template)).startswith("<yes>")
    with pytest.raises(BadRow, match="may not set messages"):
        read({**row, "chat_template_kwargs": {"messages": []}}, "messages", template)


def test_prompt_and_completion_as_text() -> None:
    example = read({"prompt": "2+2=", "completion": "4"}, "prompt-completion")
    assert example == Example("2+2=4", ((4, 5),))
    assert bare({"prompt": None, "completion": "4"}, "prompt-completion") == Example("4", ((0, 1),))
    with pytest.raises(BadRow, match="the column system cannot be used with a text prompt"):
        read({"prompt": "q", "completion": "a", "system": "S"}, "prompt-completion")


def test_only_the_completion_of_messages_is_learned() -> None:
    row = {"prompt": chat("q1", "a1", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}
    assert learned(read(row, "prompt-completion")) == ["a2<end>"]
    assert learned(read({"prompt": chat("q"), "completion": "a"}, "prompt-completion")) == ["a<end>"]
    assert learned(read({"prompt": "q", "completion": chat("q", "a")[1:]}, "prompt-completion")) == ["a<end>"]


def test_instructions_without_and_with_a_template() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    example = bare(row, "instruction")
    assert example.text == "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3"
    assert (learned(example), example.complete) == (["3"], False)
    rendered = read(row, "instruction")
    assert text(rendered) == "<user>Add.\n\n1 2<end><assistant>3<end>"
    assert learned(rendered) == ["3<end>"]
    for empty in (None, "", "  "):
        assert "Add.\n\n###" in bare({**row, "input": empty}, "instruction").text
    assert "### Instruction:\n1 2\n\n###" in bare({**row, "instruction": ""}, "instruction").text


def test_instructions_with_system_and_history() -> None:
    row = {"instruction": "q1", "output": "a1", "system": "You are kappa.", "history": [["q0", "a0"]]}
    example = read(row, "instruction")
    assert text(example) == (
        "<system>You are kappa.<end><user>q0<end><assistant>a0<end><user>q1<end><assistant>a1<end>"
    )
    assert learned(example) == ["a0<end>", "a1<end>"]
    assert learned(read(row, "instruction", learn="last")) == ["a1<end>"]
    without = bare(row, "instruction")
    assert without.text == (
        "You are kappa.\n\n### Instruction:\nq0\n\n### Response:\na0\n\n### Instruction:\nq1\n\n### Response:\na1"
    )
    assert learned(without) == ["a0", "a1"]
    with pytest.raises(BadRow, match="history must be a list of question-answer pairs"):
        read({**row, "history": ["q0", "a0"]}, "instruction")


def test_all_of_a_text_is_learned() -> None:
    assert read({"text": "abc"}, "text") == Example("abc", ((0, 3),))


def test_byte_order_marks_are_removed() -> None:
    assert read({"text": "\ufeffabc"}, "text") == Example("abc", ((0, 3),))
    assert text(read({"prompt": "\ufeffq", "completion": "\ufeffa"}, "prompt-completion")) == "qa"
    assert text(read({"messages": chat("\ufeffq", "\ufeffa")}, "messages")) == "<user>q<end><assistant>a<end>"


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"messages": []}, "messages", Reason.EMPTY),
        ({"messages": None}, "messages", Reason.EMPTY),
        ({}, "messages", Reason.EMPTY),
        ({"messages": chat("only a question")}, "messages", Reason.NO_ASSISTANT),
        ({"messages": chat("q", "")}, "messages", Reason.EMPTY_ANSWERS),
        ({"messages": [*chat("q"), {"role": "assistant", "content": None}]}, "messages", Reason.EMPTY_ANSWERS),
        (
            {"messages": [*chat("q"), {"role": "assistant", "content": "a", "weight": 0}]},
            "messages",
            Reason.SWITCHED_OFF,
        ),
        ({"prompt": "p", "completion": ""}, "prompt-completion", Reason.EMPTY),
        ({"prompt": "p", "completion": None}, "prompt-completion", Reason.EMPTY),
        ({"instruction": "i", "output": ""}, "instruction", Reason.EMPTY),
        ({"text": " \n"}, "text", Reason.EMPTY),
        ({"text": None}, "text", Reason.EMPTY),
    ],
)
def test_rows_without_anything_to_learn(row: Row, kind: str, reason: Reason) -> None:
    assert read(row, kind) is reason


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"messages": "hello"}, "messages", "messages is text that is not JSON"),
        ({"messages": 3}, "messages", "messages must be a list, found int"),
        ({"messages": ["hello"]}, "messages", "a message needs role and content, found 'hello'"),
        ({"messages": [{"role": "user"}]}, "messages", "a message needs role and content"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages", "a message needs role and content"),
        ({"conversations": {"from": "human"}}, "messages", "conversations must be a list, found dict"),
        ({"conversations": [{"from": "gpt"}]}, "messages", "a turn needs from and value"),
        ({"prompt": 3, "completion": "x"}, "prompt-completion", "prompt must be text, found int"),
        ({"prompt": ["x"], "completion": ["y"]}, "prompt-completion", "prompt and completion are lists"),
        ({"instruction": "x", "output": 3}, "instruction", "output must be text, found int"),
        ({"text": ["x"]}, "text", "text must be text, found list"),
        ({"messages": chat("q", "a"), "tools": "[…"}, "messages", "tools is text that is not JSON"),
        ({"messages": chat("q", "a"), "tools": {"a": 1}}, "messages", "tools must be a list of objects"),
    ],
)
def test_invalid_rows_are_rejected(row: Row, kind: str, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        read(row, kind)


def test_messages_need_a_template() -> None:
    with pytest.raises(BadRow, match=r"need a chat template.*data\.chat_template"):
        Reader("messages", None).read({"messages": chat("q", "a")})
