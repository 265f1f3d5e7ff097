"""The text model: what it reports, stop, streams, async, batches, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.prompts import PromptTemplate

from kvrag import Engine
from kvrag.ingested import known_of
from langchain_kvrag import ChatKVCache, KVCacheLLM


def text_model(engine: Engine, **settings: Any) -> KVCacheLLM:
    return KVCacheLLM(engine=engine, **{"max_tokens": 16, **settings})


def info(result: Any, n: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = result.generations[n][0].generation_info
    return told


def test_documents_come_from_caches_that_the_chat_model_made(engine: Engine, documents: list[str]) -> None:
    known_of(engine).add(documents)
    ChatKVCache(engine=engine, max_tokens=4).invoke("\n\n".join(documents))
    told = info(text_model(engine).generate(["Use this.\n\n" + "\n\n".join(documents)]))
    assert [use["is_hit"] for use in told["kvrag"]["documents"]] == [True] * 4


def test_all_ways_to_ask_give_one_answer(bare_engine: Engine) -> None:
    model = text_model(bare_engine)
    whole = model.invoke("Why?")

    async def streamed() -> str:
        return "".join([piece async for piece in model.astream("Why?")])

    assert "".join(model.stream("Why?")) == whole
    assert asyncio.run(streamed()) == whole
    assert asyncio.run(model.ainvoke("Why?")) == whole
    assert (PromptTemplate.from_template("Wh{x}?") | model).invoke({"x": "y"}) == whole
    assert len(list(model.stream("Why?"))) > 4


def test_batches_answer_in_order(bare_engine: Engine) -> None:
    model = text_model(bare_engine)
    questions = [f"Why {n}?" for n in range(5)]
    alone = [model.invoke(question) for question in questions]
    assert model.batch(questions) == alone
    assert asyncio.run(model.abatch(questions)) == alone


def test_counts_of_all_prompts_are_added_up(bare_engine: Engine) -> None:
    made = text_model(bare_engine).generate(["Why?", "Who is it?"])
    usages = [info(made, n)["usage_metadata"] for n in range(2)]
    assert made.llm_output is not None
    assert made.llm_output["token_usage"] == {
        "prompt_tokens": sum(usage["input_tokens"] for usage in usages),
        "completion_tokens": sum(usage["output_tokens"] for usage in usages),
        "total_tokens": sum(usage["total_tokens"] for usage in usages),
    }
    assert usages[0]["input_tokens"] == 1 + len(text_model(bare_engine).get_token_ids("Why?"))  # BOS


def test_stop_ends_the_answer_before_the_text(bare_engine: Engine) -> None:
    model = text_model(bare_engine)
    whole = model.invoke("Why?")
    stop = whole[4:7]
    expected = whole[: whole.index(stop)]
    assert model.invoke("Why?", stop=[stop]) == expected
    assert "".join(model.stream("Why?", stop=[stop])) == expected
    assert text_model(bare_engine, stop=[stop]).invoke("Why?") == expected


def test_what_it_is_goes_into_its_identity(bare_engine: Engine) -> None:
    model = text_model(bare_engine)
    assert model._llm_type == "kvrag"
    assert len(model._identifying_params["fingerprint"]) == 64
    assert model._get_ls_params(stop=["a"])["ls_provider"] == "kvrag"
    assert "langchain-kvrag" in model.metadata["lc_versions"]  # type: ignore[index]


def test_errors_are_those_of_the_chat_model(bare_engine: Engine) -> None:
    with pytest.raises(ContextOverflowError):
        text_model(bare_engine).invoke("a" * 5000)
    slow = text_model(bare_engine, max_tokens=4000, temperature=1.0, seed=1, timeout=0.05)
    with pytest.raises(TimeoutError):
        slow.batch(["Why?", "Who?"])
    assert text_model(bare_engine).invoke("Why?")
