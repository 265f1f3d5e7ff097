"""Conversations with tools, calls, results, documents and parts, for templates that know them and others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from kvrag.config import Sampling
from kvrag.constrain import tool_calls
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.messages import ToolCall, parse_calls
from kvrag.testing.models import tiny, tiny_tokenizer
from kvrag.text import Text

HERMES = (  # as Qwen's and others': tools in the system message, calls and results in tags
    "{% if tools %}<|system|>Tools:{% for t in tools %}{{ t | tojson }}\n{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "</s>{% endfor %}"
    "{% if documents %}{% for d in documents %}[{{ d.title }}] {{ d.text }}{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GEMMA = (  # no system message, no tools, turns that alternate
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "maxLength": 4}, "days": {"enum": [1, 2]}},
        "required": ["town"],
        "additionalProperties": False,
    },
}
ARGUMENTS = {"town": "Varn"}
DOCUMENT = "The lighthouse of Varn\n\nwas built in 1871."


def text(template: str | None = None) -> Text:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return Text(tokenizer)


def called(arguments: Any = None) -> Mapping[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS) if arguments is None else arguments}
    return {"id": "abcdefghi", "type": "function", "function": function}


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sun today?"},
    {"role": "assistant", "content": None, "tool_calls": [called()]},
    {"role": "tool", "content": DOCUMENT, "tool_call_id": "abcdefghi"},
]


def test_a_template_that_knows_tools_gets_them() -> None:
    written = text(HERMES).render(TALK, [WEATHER])
    spec = {"type": "function", "function": WEATHER}
    assert written.startswith("<|system|>Tools:")
    assert json.loads(written.split("Tools:")[1].split("\n")[0]) == spec
    call = json.loads(written.split("<tool_call>")[1].split("</tool_call>")[0])
    assert call == {"name": "get_weather", "arguments": ARGUMENTS}
    assert f"<|tool|>{DOCUMENT}</s>" in written
    assert written.endswith("<|assistant|>")


def test_both_forms_of_tools_and_calls_are_the_same() -> None:
    other = [*TALK[:2], {**TALK[2], "tool_calls": [{"name": "get_weather", "args": ARGUMENTS}]}, TALK[3]]
    for template in (HERMES, None):
        found = text(template)
        expected = found.render(TALK, [WEATHER])
        assert found.render(TALK, [{"type": "function", "function": WEATHER}]) == expected
        assert found.render(
            [*TALK[:2], {**TALK[2], "tool_calls": [called(ARGUMENTS)]}, TALK[3]], [WEATHER]
        ) == (expected)
        if template is None:  # where ids are not written
            other[3] = {**TALK[3], "name": "get_weather"}
            assert found.render(other, [WEATHER]) == expected


def test_any_other_template_gets_the_plain_way() -> None:
    written = text().render(TALK, [WEATHER])
    system, user, assistant, result, rest = written.split("</s>\n")
    assert system.startswith("<s><|system|>\nBe brief.\n\nYou can call functions.")
    assert json.loads(system.split("\n")[-1]) == WEATHER
    assert user == "<|user|>\nSun today?"
    assert parse_calls(assistant.removeprefix("<|assistant|>\n")) == [ToolCall("get_weather", ARGUMENTS)]
    assert result == f"<|user|>\nResult of get_weather:\n{DOCUMENT}"
    assert rest == "<|assistant|>\n"


def test_a_template_without_system_messages_gets_all_from_the_user() -> None:
    found = text(GEMMA)
    written = found.render(TALK, [WEATHER], [DOCUMENT])
    assert written.startswith("[user]Be brief.\n\nYou can call functions.")
    assert DOCUMENT in written.split("[assistant]")[0]
    assert written.split("[assistant]")[0].endswith("Sun today?")
    two = [*TALK[1:], TALK[3], {"role": "user", "content": "So?"}]
    assert found.render(two, [WEATHER]).count("[user]") == 2  # what follows each other is one turn


def test_results_without_tools_at_hand_are_rendered_too() -> None:
    assert f"Result of get_weather:\n{DOCUMENT}" in text().render(TALK)
    assert f"Result of the function:\n{DOCUMENT}" in text().render([TALK[1], TALK[3]])


def test_the_reader_gets_tools() -> None:
    with Engine.from_pretrained() as engine:
        written = engine.render(TALK, [WEATHER], [{"title": "T", "text": DOCUMENT}])
        assert all(part in written for part in ("Be brief.", "get_weather", DOCUMENT, f"T\n{DOCUMENT}"))
        assert written.endswith("<|assistant|>")
        assert engine.count_tokens("a b") == len(engine.model.text.tokenize("a b"))
        found = engine.stream_rendered(written, [DOCUMENT], sampling=Sampling(max_new_tokens=2))
        for _ in found:
            pass
        assert found.answer is not None
        assert [d.key for d in found.answer.documents] == ["0", "0"]


@pytest.mark.parametrize("document", [DOCUMENT, {"title": "Varn", "text": DOCUMENT}], ids=["text", "titled"])
def test_documents_are_written_word_for_word(document: Any) -> None:
    own = text(HERMES).render(TALK[:2], documents=[document])
    assert f"] {DOCUMENT}" in own
    plain = text().render(TALK[:2], documents=[document, "Another."])
    title = "Varn\n" if isinstance(document, dict) else ""
    assert plain.startswith(f"<s><|system|>\nBe brief.\n\n{title}{DOCUMENT}\n\nAnother.</s>")


PARTS = [
    (None, ""),
    ("a", "a"),
    ([], ""),
    (["a", "b"], "a\nb"),
    ([{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}], "a\nb\nc"),
]


@pytest.mark.parametrize(("content", "expected"), PARTS, ids=range(len(PARTS)))
def test_parts_are_one_text(content: Any, expected: str) -> None:
    assert text().render([{"role": "user", "content": content}]) == (
        f"<s><|user|>\n{expected}</s>\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("messages", "tools", "documents", "reason"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], None, None, "type image_url.*text only"),
        ([{"role": "user", "content": [3]}], None, None, "type int"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], None, None, "expected a name"),
        ([{"role": "assistant", "tool_calls": [called("{")]}], None, None, "no JSON"),
        ([{"role": "assistant", "tool_calls": [called("[1]")]}], None, None, "arguments by name"),
        (TALK[:1], [{"description": "d"}], None, "a tool is"),
        (TALK[:1], None, [{"title": "t"}], "a document is"),
    ],
    ids=range(7),
)
def test_what_is_no_conversation_is_an_input_error(
    messages: Sequence[Any], tools: Any, documents: Any, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        text().render(messages, tools, documents)


def test_plain_conversations_are_the_templates_own() -> None:
    assert text(GEMMA).render([{"role": "user", "content": "Hi"}]) == "[user]Hi"
    with pytest.raises(InputError, match="System role"):
        text(GEMMA).render(TALK[:2])


# ---- calls


LINE = ToolCall("get_weather", ARGUMENTS).text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (LINE, 1),
        (f" {LINE}\n{LINE} \n", 2),
        (json.dumps(json.loads(LINE), indent=1), 1),
        (f"<tool_call>\n{LINE}\n</tool_call>\n<tool_call>{LINE}</tool_call>", 2),
        (f"I look it up. <tool_call>{LINE}</tool_call>", 1),
        ('{"name": "get_weather", "parameters": {"town": "Varn"}}', 1),
        (f"So: {LINE}", 0),
        (f"{LINE}\nand more", 0),
        ("", 0),
        ("[1]", 0),
        ('{"name": 3}', 0),
        ('{"name": "a", "arguments": 3}', 0),
    ],
    ids=range(12),
)
def test_calls_are_found_in_answers(written: str, expected: int) -> None:
    assert parse_calls(written) == [ToolCall("get_weather", ARGUMENTS)] * expected


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny()) as made:
        yield made


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("several", [False, True])
def test_a_model_can_be_held_to_calls(engine: Engine, several: bool, seed: int | None) -> None:
    tools = [WEATHER, {"function": {"name": "stop"}}]
    prompt = engine.render(TALK[:2], [WEATHER])
    sampling = Sampling(
        constraint=tool_calls([tools[0]], several=several), temperature=2.0 if seed else 0.0, seed=seed
    )
    found = engine.answer(prompt, sampling=sampling)
    calls = parse_calls(found.text)
    if found.finish_reason == "stop":
        assert len(calls) == 1 or several
        assert calls
    for call in calls:
        assert call.name == "get_weather"
        assert set(call.arguments) <= {"town", "days"}
        assert len(call.arguments["town"]) <= 4
    tool_calls(tools)
    with pytest.raises(ConfigError, match="no tools"):
        tool_calls([])
