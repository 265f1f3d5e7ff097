"""Tools, forms of answers and log probabilities: what the standard suites only check the type of."""

from __future__ import annotations

import json
from typing import Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from kvrag import ConfigError, Engine
from langchain_kvrag import ChatKVCache, KVCacheLLM


@tool
def look(place: str) -> str:
    """Look at a place."""
    return place


@tool
def wait(minutes: int) -> str:
    """Wait."""
    return str(minutes)


class Person(BaseModel):
    """A person."""

    name: str
    is_happy: bool


class PersonDict(TypedDict):
    """A person."""

    name: str
    is_happy: bool


@pytest.fixture
def model(bare_engine: Engine) -> ChatKVCache:
    return ChatKVCache(engine=bare_engine, max_tokens=96, max_json_chars=8)


def test_tools_stand_in_the_prompt(model: ChatKVCache) -> None:
    without = model.get_num_tokens_from_messages([HumanMessage("Why?")])
    tools = [look, wait]
    answer = model.bind_tools(tools).invoke("Why?")
    assert answer.usage_metadata is not None
    count = model.get_num_tokens_from_messages([HumanMessage("Why?")], tools)
    assert answer.usage_metadata["input_tokens"] == count > without
    none = model.bind_tools(tools, tool_choice="none").invoke("Why?")
    assert none.usage_metadata is not None
    assert none.usage_metadata["input_tokens"] == without


@pytest.mark.parametrize("choice", ["look", {"type": "function", "function": {"name": "look"}}])
def test_a_choice_of_a_tool_is_kept(model: ChatKVCache, choice: Any) -> None:
    answer = model.bind_tools([look, wait], tool_choice=choice).invoke("Why?")
    (call,) = answer.tool_calls
    assert call["name"] == "look"
    assert set(call["args"]) == {"place"}
    assert call["id"]
    assert answer.content == ""


@pytest.mark.parametrize("choice", ["any", "required", True])
def test_any_tool_is_called(model: ChatKVCache, choice: Any) -> None:
    (call,) = model.bind_tools([look], tool_choice=choice).invoke("Why?").tool_calls
    assert call["name"] == "look"


def test_streams_give_calls_and_no_text_of_them(model: ChatKVCache) -> None:
    bound = model.bind_tools([look], tool_choice="look")
    whole: Any = None
    for chunk in bound.stream("Why?"):
        assert chunk.content == ""
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert call["args"] == bound.invoke("Why?").tool_calls[0]["args"]


def test_a_tool_that_is_not_there_is_refused(model: ChatKVCache) -> None:
    with pytest.raises(ConfigError, match="expected auto, any, none or one of look"):
        model.bind_tools([look], tool_choice="jump")


def test_results_of_tools_are_read(model: ChatKVCache) -> None:
    call = {"name": "look", "args": {"place": "Varn"}, "id": "1", "type": "tool_call"}
    talk = [
        HumanMessage("Why?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("A red door.", tool_call_id="1"),
    ]
    read = model.bind_tools([look]).invoke(talk)
    assert read.usage_metadata is not None
    assert "A red door." in model._render(talk, [look])
    assert read.usage_metadata["input_tokens"] == model.get_num_tokens_from_messages(talk, [look])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Person, PersonDict, Person.model_json_schema()])
def test_answers_have_the_schemas_form(model: ChatKVCache, method: Any, schema: Any) -> None:
    made = model.with_structured_output(schema, method=method).invoke("Who?")
    plain = made.model_dump() if isinstance(made, BaseModel) else made
    assert isinstance(plain, dict)
    assert isinstance(plain["name"], str)
    assert isinstance(plain["is_happy"], bool)
    assert isinstance(made, Person) == (schema is Person)


async def test_raw_answers_come_along(model: ChatKVCache) -> None:
    kept = model.with_structured_output(Person, include_raw=True)
    told: Any = await kept.ainvoke("Who?")
    assert json.loads(told["raw"].content) == told["parsed"].model_dump()
    assert told["parsing_error"] is None
    short = ChatKVCache(engine=model.engine, max_tokens=3).with_structured_output(Person, include_raw=True)
    cut: Any = short.invoke("Who?")
    assert cut["parsed"] is None
    assert cut["parsing_error"] is not None


def test_unknown_methods_are_refused(model: ChatKVCache) -> None:
    wrong: Any = "telepathy"
    with pytest.raises(ConfigError, match="expected json_schema, function_calling or json_mode"):
        model.with_structured_output(Person, method=wrong)
    with pytest.raises(ConfigError, match="needs a schema"):
        model.with_structured_output()
    with pytest.raises(ConfigError, match="no argument 'wish'"):
        model.with_structured_output(Person, wish=1)


# ---- log probabilities


def test_each_token_says_how_likely_it_was(bare_engine: Engine) -> None:
    model = ChatKVCache(engine=bare_engine, max_tokens=8, logprobs=True, top_logprobs=3)
    answer = model.invoke("Why?")
    content = answer.response_metadata["logprobs"]["content"]
    assert answer.usage_metadata is not None
    assert len(content) == answer.usage_metadata["output_tokens"]
    for token in content:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"])  # greedy
    whole: Any = None
    for chunk in model.stream("Why?"):
        whole = chunk if whole is None else whole + chunk
    assert [t["token"] for t in whole.response_metadata["logprobs"]["content"]] == [
        t["token"] for t in content
    ]
    assert "logprobs" not in ChatKVCache(engine=bare_engine, max_tokens=8).invoke("Why?").response_metadata


def test_the_text_model_says_so_too(bare_engine: Engine) -> None:
    model = KVCacheLLM(engine=bare_engine, max_tokens=8)
    told: Any = model.generate(["Why?"], logprobs=True).generations[0][0].generation_info
    assert len(told["logprobs"]["content"]) == told["usage_metadata"]["output_tokens"]
