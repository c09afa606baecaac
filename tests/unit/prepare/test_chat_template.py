"""Exactly the assistant's text is learned, with the chat templates of all model families."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.prepare.chat_template import ChatTemplate, read_template
from launcher.prepare.conversations import Reason
from launcher.prepare.row_formats import Example, Reader
from launcher.prepare.row_values import BadRow
from tests.unit.prepare.chats import TEMPLATES, call, chat, learned, reader, template, tool

TWO = chat("q1", "a1", "q2", "a2")
SYSTEM = [{"role": "system", "content": "S"}, *chat("q1", "a1")]
THOUGHT = chat("q1", "<think>\nhm\n</think>\n\na1", "q2", "<think>\nah\n</think>\n\na2")
REASONED = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "hm"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2", "reasoning_content": "ah"},
]
CALLED = [*chat("q1"), call(), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a1"}]
QWEN_CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'

ENDS = {
    "always_prompt": ("<|eot_id|>", "<|eot_id|>"),
    "chatml": ("<|im_end|>\n", "<|im_end|>\n"),
    "deepseek_r1": ("</s>", "</s>"),
    "end_only": ("", "</s>"),
    "gemma": ("<end_of_turn>\n", "<end_of_turn>\n"),
    "generation": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "merging": ("<|end|>", "<|end|>"),
    "no_end": ("\n", "\n"),
    "no_prompt": ("<|end|>", "<|end|>"),
    "no_tools": ("<|eot_id|>", "<|eot_id|>"),
    "only_user_and_assistant": ("</s>", "</s>"),
    "parts": ("<|im_end|>\n", "<|im_end|>\n"),
    "phi": ("<|end|>\n", "<|end|>\n</s>"),
    "qwen25": ("<|im_end|>\n", "<|im_end|>\n"),
    "results_inside": ("<end_of_turn>\n", "<end_of_turn>\n"),
    "unclosed_last": ("<|im_end|>\n", ""),
}
"""The text that ends an earlier turn, and the last turn."""


@pytest.mark.parametrize("tokens", [True, False], ids=["added tokens", "no added tokens"])
@pytest.mark.parametrize("name", ENDS)
def test_each_answer_is_learned_with_its_end(name: str, tokens: bool) -> None:
    earlier, last = ENDS[name]
    source = template(name) if tokens else template(name, ())
    example = Reader("messages", source).read({"messages": TWO})
    assert learned(example) == [f"a1{earlier}", f"a2{last}"]
    assert isinstance(example, Example)
    assert (example.partly, example.shortened) == (False, False)
    assert example.open_ended is (name in ("no_end", "unclosed_last"))


@pytest.mark.parametrize(
    ("name", "messages", "wanted"),
    [
        ("qwen3", TWO, ["a1<|im_end|>\n", "<think>\n\n</think>\n\na2<|im_end|>\n"]),
        ("qwen3", THOUGHT, ["a1<|im_end|>\n", "<think>\nah\n</think>\n\na2<|im_end|>\n"]),
        ("qwen3", REASONED, ["a1<|im_end|>\n", "<think>\nah\n</think>\n\na2<|im_end|>\n"]),
        ("qwen3", CALLED, [QWEN_CALL, "<think>\n\n</think>\n\na1<|im_end|>\n"]),
        ("qwen25", CALLED, [QWEN_CALL, "a1<|im_end|>\n"]),
        ("qwen25", SYSTEM, ["a1<|im_end|>\n"]),
        ("llama3", CALLED, ['{"name": "get", "parameters": {"city": "Paris"}}<|eot_id|>', "a1<|eot_id|>"]),
        ("mistral", TWO, [" a1</s>", " a2</s>"]),
        ("mistral", SYSTEM, [" a1</s>"]),
        (
            "mistral",
            CALLED,
            ['[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>', " a1</s>"],
        ),
        ("deepseek_r1", THOUGHT, ["\n\na1</s>", "\n\na2</s>"]),
        (
            "deepseek_r1",
            CALLED,
            [
                '<｜calls｜><｜call｜>function<｜sep｜>get\n```json\n{"city": "Paris"}\n```<｜/call｜><｜/calls｜></s>',
                "a1</s>",
            ],
        ),
        ("gemma", SYSTEM, ["a1<end_of_turn>\n"]),
        ("harmony", TWO, ["<|channel|>final<|message|>a1<|end|>", "<|channel|>final<|message|>a2<|return|>"]),
        (
            "harmony",
            REASONED,
            [
                "<|channel|>final<|message|>a1<|end|>",
                "<|channel|>analysis<|message|>ah<|end|><|start|>assistant<|channel|>final<|message|>a2<|return|>",
            ],
        ),
        (
            "harmony",
            CALLED,
            [
                ' to=functions.get<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
                "<|channel|>final<|message|>a1<|return|>",
            ],
        ),
        ("always_prompt", CALLED, ['[get: {"city": "Paris"}]<|eot_id|>', "a1<|eot_id|>"]),
        ("always_prompt", CALLED[:2], ['[get: {"city": "Paris"}]<|eot_id|>']),
        ("results_inside", CALLED, ['<call>get{"city": "Paris"}</call>', "a1<end_of_turn>\n"]),
        ("merging", [*chat("q", "a0"), {"role": "assistant", "content": "a1"}], ["a0\n\na1<|end|>"]),
        ("llama3", chat(" q ", "\n a \n"), ["a<|eot_id|>"]),
        ("chatml", chat(" q ", "\n a \n"), ["\n a \n<|im_end|>\n"]),
        ("chatml", chat("q", "a", "q2"), ["a<|im_end|>\n"]),
        ("chatml", chat("", "a1", "", "a2"), ["a1<|im_end|>\n", "a2<|im_end|>\n"]),
        ("llama3", chat("x", "hello", "q", "a")[1:], ["hello<|eot_id|>", "a<|eot_id|>"]),
        ("qwen25", chat("x", "hello", "q", "a")[1:], ["hello<|im_end|>\n", "a<|im_end|>\n"]),
        (
            "chatml",
            chat("<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n?"),
            ["<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"],
        ),
    ],
)
def test_features_of_model_families(name: str, messages: list[dict[str, Any]], wanted: list[str]) -> None:
    assert learned(reader(name).read({"messages": messages})) == wanted


def test_the_rendered_text_is_otherwise_unchanged() -> None:
    example = reader("qwen25").read({"messages": chat("q", "a")})
    assert isinstance(example, Example)
    assert example.text == (
        "<|im_start|>system\nBe of help.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert example.complete


def test_the_date_is_the_same_every_day() -> None:
    example = reader("llama3").read({"messages": chat("q", "a")})
    assert isinstance(example, Example)
    assert "Today Date: 26 Jul 2024\n" in example.text
    given = reader("llama3", date_string="1 May 2020").read({"messages": chat("q", "a")})
    assert isinstance(given, Example)
    assert "Today Date: 1 May 2020\n" in given.text
    assert template("llama3").writes_date
    assert not template("chatml").writes_date


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3"])
def test_reasoning_that_the_template_drops_is_reported(name: str) -> None:
    example = reader(name).read({"messages": THOUGHT})
    assert isinstance(example, Example)
    assert example.shortened


def test_a_generation_prompt_missing_before_answers_is_reported() -> None:
    example = reader("deepseek_r1").read({"messages": TWO})
    assert isinstance(example, Example)
    assert example.unwritten == "<think>\n"
    plain = reader("qwen3", enable_thinking=False).read({"messages": TWO})
    assert isinstance(plain, Example)
    assert (plain.unwritten, learned(plain)) == ("", ["a1<|im_end|>\n", "a2<|im_end|>\n"])


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("no_tools", CALLED, r"no_tools does not write tool_calls \(message 2\)"),
        ("chatml", CALLED, "chatml does not write tool_calls"),
        ("only_user_and_assistant", SYSTEM, r"drops the turn of role system \(message 1\)"),
        ("phi", [*chat("q", "a"), {"role": "tool", "content": "7"}], "drops the turn of role tool"),
        ("system_before_the_last_question", SYSTEM, "drops the turn of role system"),
        ("gemma", chat("q", "a")[1:], "gemma rejects these messages: roles must alternate"),
        ("gemma", CALLED, "gemma rejects these messages: roles must alternate"),
        ("llama3", [*chat("q"), call(tool_calls=call()["tool_calls"] * 2)], "one tool call at a time"),
    ],
)
def test_rows_with_parts_that_a_template_drops_are_rejected(
    name: str, messages: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(BadRow, match=words):
        reader(name).read({"messages": messages})


def test_rows_with_tools_that_a_template_drops_are_rejected() -> None:
    row = {"messages": CALLED, "tools": [tool()]}
    assert learned(reader("qwen25").read(row))[0] == QWEN_CALL
    with pytest.raises(BadRow, match="deepseek_r1 does not write tools"):
        reader("deepseek_r1").read(row)


def test_arguments_are_json_even_if_a_template_would_print_python() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}: {{ c.function.arguments }}{% endfor %}<end>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = Reader("messages", ChatTemplate(source, "printing")).read({"messages": [*chat("q"), call()]})
    assert learned(found) == ['get: {"city": "Paris"}<end>']


def test_generation_blocks_define_the_span_and_a_missing_end_is_added() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}note: "
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    found = Reader("messages", ChatTemplate(source, "marked")).read({"messages": TWO})
    assert learned(found) == ["a1<|end|>", "a2<|end|>"]


def test_turns_outside_generation_blocks_are_not_learned() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}"
    )
    found = Reader("messages", ChatTemplate(source, "marked")).read({"messages": TWO})
    assert learned(found) == ["a2<|end|>"]
    assert isinstance(found, Example)
    assert found.partly
    assert Reader("messages", ChatTemplate(source, "marked")).read({"messages": TWO[:3]}) is Reason.NOT_FOUND


def test_a_tool_result_inside_the_calling_turn_is_not_learned() -> None:
    spoken = [*chat("q"), call(content="let me look"), {"role": "tool", "content": "7"}]
    example = reader("results_inside").read({"messages": [*spoken, {"role": "assistant", "content": "a1"}]})
    assert learned(example) == ['<call>get{"city": "Paris"}</call>', "a1<end_of_turn>\n"]
    assert isinstance(example, Example)
    assert example.partly


def test_only_the_last_turn_is_learned() -> None:
    found = Reader("messages", template("chatml"), learn="last").read({"messages": TWO})
    assert learned(found) == ["a2<|im_end|>\n"]


def test_the_jobs_template_is_a_file_or_text(tmp_path: Any) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATES["chatml"])
    assert read_template(str(file)) == (TEMPLATES["chatml"], f"the chat template {file}")
    assert read_template("{{ messages }}")[0] == "{{ messages }}"
    with pytest.raises(Exception, match="cannot be read: No such file"):
        read_template(str(tmp_path / "none.jinja"))
    with pytest.raises(Exception, match=r"is not a Jinja template \(line 1\)"):
        ChatTemplate("{% for %}", "broken")


def test_most_conversations_are_rendered_twice() -> None:
    chats = [chat(f"q{i}", f"a{i}", "q", f"b{i}") for i in range(50)]
    one = reader("qwen3")
    assert one.template is not None
    one.read({"messages": chats[0]})
    count = 0
    finder = next(iter(one.template._finders.values()))
    render = finder.render

    def counted(*arguments: Any, **named: Any) -> str:
        nonlocal count
        count += 1
        return render(*arguments, **named)

    finder.render = counted
    for messages in chats[1:]:
        one.read({"messages": messages})
    assert count == 2 * 49
