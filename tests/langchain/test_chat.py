"""The chat model: what it reports, stop, streams, async, errors, many callers."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

import kvrag
from kvrag import ConfigError, ContextOverflow, Engine, GenerationCancelled, InputError, Model
from kvrag.focus import Policy
from kvrag.ingested import known_of
from kvrag.testing.models import tiny_tokenizer
from langchain_kvrag import ChatKVCache


def chat(engine: Engine, **settings: Any) -> ChatKVCache:
    return ChatKVCache(engine=engine, **{"max_tokens": 16, **settings})


def over(documents: list[str], question: str = "Why?") -> list[Any]:
    return [SystemMessage("\n\n".join(documents)), HumanMessage(question)]


# ---- what an answer reports


def test_the_first_answer_fills_the_store_and_the_second_reads_it(
    engine: Engine, documents: list[str], cached: Any
) -> None:
    model = chat(engine)
    known_of(engine).add(documents)
    first, second = model.invoke(over(documents)), model.invoke(over(documents))
    assert first.content == second.content
    text = engine.model.text
    prefix = len(text.tokenize(text.opening, first=True))
    expected = sum(len(text.tokenize(document)) for document in documents)
    assert cached(first) == prefix
    assert cached(second) == prefix + expected
    told = second.response_metadata["kvrag"]
    assert [d["is_hit"] for d in told["documents"]] == [True] * 4
    assert sum(d["mass"] for d in told["documents"]) > 0
    assert second.response_metadata["model_name"] == "tiny llama"
    assert second.response_metadata["finish_reason"] in {"stop", "length"}
    json.dumps(second.response_metadata)


def test_answers_do_not_depend_on_the_store(
    bare_engine: Engine, engine: Engine, documents: list[str]
) -> None:
    for held in (bare_engine, engine):
        known_of(held).add(documents)
    answers = {chat(held).invoke(over(documents)).content for held in (bare_engine, engine, engine)}
    assert len(answers) == 1


def test_without_caches_the_prompt_is_read_as_a_whole(
    engine: Engine, documents: list[str], cached: Any
) -> None:
    known_of(engine).add(documents)
    answer = chat(engine, caches=False).invoke(over(documents))
    assert cached(answer) == 0
    assert answer.response_metadata["kvrag"]["documents"] == []
    assert engine.store is not None
    assert list(engine.store.ids()) == []


def test_usage_is_counted_by_langchains_own_handler(bare_engine: Engine) -> None:
    with get_usage_metadata_callback() as counted:
        answer = chat(bare_engine).invoke("Why?")
        streamed = list(chat(bare_engine).stream("Why?"))
    assert answer.usage_metadata is not None
    total = counted.usage_metadata["tiny llama"]
    assert total["total_tokens"] == 2 * answer.usage_metadata["total_tokens"]
    assert sum(chunk.usage_metadata is not None for chunk in streamed) == 1


def test_what_the_model_is_goes_into_its_identity(bare_engine: Engine, engine: Engine) -> None:
    plain = chat(bare_engine)._identifying_params
    assert len(plain["fingerprint"]) == 64
    assert plain["dtype"] == "float32"
    assert (plain["caches"], chat(engine)._identifying_params["caches"]) == ("none", "DiskStore raw")
    others = [
        chat(bare_engine, policy="epic"),
        chat(bare_engine, temperature=1.0),
        chat(bare_engine, prefix="x"),
    ]
    strings = {model._get_llm_string() for model in [chat(bare_engine), *others]}
    assert len(strings) == 4
    assert chat(bare_engine)._get_ls_params()["ls_provider"] == "kvrag"
    assert chat(bare_engine).metadata["lc_versions"]["langchain-kvrag"] == kvrag.__version__  # type: ignore[index]


def test_langchains_own_cache_of_answers_works(bare_engine: Engine) -> None:
    cache = InMemoryCache()
    first = chat(bare_engine, cache=cache).invoke("Why?")
    again = chat(bare_engine, cache=cache).invoke("Why?")
    assert first.content == again.content
    assert again.usage_metadata is not None
    assert "total_cost" in again.usage_metadata  # LangChain's sign that nothing was computed


def test_tokens_are_counted_by_the_models_own_tokenizer(bare_engine: Engine) -> None:
    model = chat(bare_engine)
    messages = [SystemMessage("the hat"), HumanMessage("Why?")]
    answer = model.invoke(messages)
    assert answer.usage_metadata is not None
    assert model.get_num_tokens_from_messages(messages) == answer.usage_metadata["input_tokens"]
    assert model.get_num_tokens("the hat") == len(
        tiny_tokenizer().encode("the hat", add_special_tokens=False)
    )


def test_the_window_is_in_the_profile(bare_engine: Engine) -> None:
    assert chat(bare_engine).profile is not None
    assert chat(bare_engine).profile["max_input_tokens"] == 4096  # type: ignore[index]


# ---- text


def test_stop_ends_the_answer_before_the_text_and_never_shows_a_piece_of_it(bare_engine: Engine) -> None:
    whole = str(chat(bare_engine).invoke("Why?").content)
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    assert str(chat(bare_engine).invoke("Why?", stop=[stop]).content) == expected
    assert str(chat(bare_engine, stop=[stop]).invoke("Why?").content) == expected
    assert str(chat(bare_engine, stop=[stop]).invoke("Why?", stop=["\0"]).content) == whole
    assert "".join(str(c.content) for c in chat(bare_engine).stream("Why?", stop=[stop])) == expected
    assert "".join(str(c.content) for c in chat(bare_engine).bind(stop=[stop]).stream("Why?")) == expected
    assert chat(bare_engine).invoke("Why?", stop=[stop]).response_metadata["finish_reason"] == "stop"


def test_no_special_token_gets_into_the_text(bare_engine: Engine) -> None:
    answer = str(chat(bare_engine, temperature=1.5, seed=3, max_tokens=64).invoke("Why?").content)
    assert not any(name in answer for name in tiny_tokenizer().all_special_tokens)


def test_streams_give_pieces_as_they_come(bare_engine: Engine) -> None:
    model = chat(bare_engine, max_tokens=64)
    whole = str(model.invoke("Why?").content)
    seen: list[str] = []
    stream = model.stream("Why?")
    seen.append(str(next(stream).content))
    assert 0 < len(seen[0]) < len(whole) / 4  # not buffered
    seen += [str(chunk.content) for chunk in stream]
    assert "".join(seen) == whole
    assert len([piece for piece in seen if piece]) > 8


def test_handlers_get_each_piece_when_it_is_streamed(bare_engine: Engine) -> None:
    class Heard(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.tokens.append(token)

    heard = Heard()
    answer = chat(bare_engine, streaming=True).invoke("Why?", config={"callbacks": [heard], "tags": ["a"]})
    assert "".join(heard.tokens) == answer.content


# ---- async


async def test_async_gives_the_same(bare_engine: Engine) -> None:
    model = chat(bare_engine)
    expected = model.invoke("Why?").content
    assert (await model.ainvoke("Why?")).content == expected
    assert "".join([str(chunk.content) async for chunk in model.astream("Why?")]) == expected
    assert [m.content for m in await model.abatch(["Why?", "Why?"])] == [expected] * 2


async def test_the_event_loop_goes_on_while_answers_are_written(bare_engine: Engine) -> None:
    model = chat(bare_engine, max_tokens=48, stop=["\0"])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    chunks = [chunk async for chunk in model.astream("Why?")]
    ticking.cancel()
    assert ticks > len(chunks)


async def test_a_cancelled_task_stops_its_answer(bare_engine: Engine) -> None:
    model = chat(bare_engine, max_tokens=4000, stop=["\0"], temperature=1.0, seed=1)
    task = asyncio.create_task(model.ainvoke("Why?"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await chat(bare_engine).ainvoke("Why?")).content  # the engine is free again


def test_a_stream_that_is_left_stops_its_answer_and_frees_its_rows(bare_engine: Engine) -> None:
    from kvrag.segments import KV

    def rows() -> int:
        gc.collect()
        return sum(type(found) is KV for found in gc.get_objects())

    chat(bare_engine).invoke("Why?")
    before = rows()
    stream = chat(bare_engine, max_tokens=4000, temperature=1.0, seed=1).stream("Why?")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    bare_engine.call(lambda: None)  # the worker has come round
    assert rows() <= before


def test_memory_stays_level_from_request_to_request(engine: Engine, documents: list[str]) -> None:
    import torch

    def tensors() -> int:
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    model = chat(engine)
    known_of(engine).add(documents)
    for _ in range(3):
        model.invoke(over(documents))
    before = tensors()
    for _ in range(6):
        model.invoke(over(documents))
    engine.call(lambda: None)
    assert tensors() <= before


def test_many_threads_get_their_own_documents(engine: Engine, documents: list[str]) -> None:
    model = chat(engine)
    known_of(engine).add(documents)
    prompts = [over([document]) for document in documents * 2]
    alone = [model.invoke(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model.invoke, prompts))
    assert [m.content for m in together] == [m.content for m in alone]
    keys = [[d["key"] for d in m.response_metadata["kvrag"]["documents"]] for m in together]
    assert keys == [[d["key"] for d in m.response_metadata["kvrag"]["documents"]] for m in alone]
    assert all(len(of) == 1 for of in keys)
    assert len({of[0] for of in keys}) == 4


async def test_many_tasks_get_their_own_documents(engine: Engine, documents: list[str]) -> None:
    model = chat(engine)
    known_of(engine).add(documents)
    prompts = [over([document]) for document in documents]
    alone = [await model.ainvoke(prompt) for prompt in prompts]
    together = await asyncio.gather(*(model.ainvoke(prompt) for prompt in prompts))
    assert [m.content for m in together] == [m.content for m in alone]


def test_batches_answer_in_order(bare_engine: Engine) -> None:
    model = chat(bare_engine)
    questions = [f"Why {i}?" for i in range(5)]
    assert [m.content for m in model.batch(questions)] == [model.invoke(q).content for q in questions]


# ---- what cannot be


def test_a_prompt_that_is_too_long_is_an_overflow_for_both_sides(bare_engine: Engine) -> None:
    for kind in (ContextOverflowError, ContextOverflow):
        with pytest.raises(kind, match="4096"):
            chat(bare_engine).invoke("a" * 5000)
    with pytest.raises(ContextOverflowError):
        list(chat(bare_engine).stream("a" * 5000))


def test_an_answer_that_takes_too_long_is_stopped(bare_engine: Engine) -> None:
    model = chat(bare_engine, max_tokens=4000, temperature=1.0, seed=1, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        model.invoke("Why?")
    with pytest.raises(GenerationCancelled):
        model.invoke("Why?")


def test_a_model_without_a_template_says_what_to_do(bare_engine: Engine) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = Engine(Model(bare_engine.model.network, tokenizer, name="bare"))
    with bare, pytest.raises(InputError, match="bare has no chat template; use KVCacheLLM"):
        chat(bare).invoke("Why?")


def test_what_is_not_text_is_refused(bare_engine: Engine) -> None:
    image = {"type": "image", "base64": "aGk=", "mime_type": "image/png"}
    with pytest.raises(InputError, match="'image'; this model reads text only"):
        chat(bare_engine).invoke([HumanMessage([{"type": "text", "text": "What is it?"}, image])])


def test_blocks_of_text_are_joined(bare_engine: Engine) -> None:
    blocks = HumanMessage([{"type": "text", "text": "Wh"}, "y?"])
    assert chat(bare_engine).invoke([blocks]).content == chat(bare_engine).invoke("Why?").content


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine": "x"}, "expected a kvrag.Engine"),
        ({"policy": "nonsense"}, "nonsense"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    bare_engine: Engine, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ChatKVCache(**{"engine": bare_engine, **settings})


def test_unknown_options_and_other_models_are_refused(bare_engine: Engine) -> None:
    with pytest.raises(ConfigError, match="no option 'presence_penalty'"):
        chat(bare_engine).invoke("Why?", presence_penalty=1.0)
    with pytest.raises(ConfigError, match="this one serves 'tiny llama'"):
        chat(bare_engine).invoke("Why?", model="gpt-5")


# ---- engines


def test_models_with_equal_settings_share_an_engine_and_close_it(tmp_path: Path) -> None:
    one = ChatKVCache(store=tmp_path, max_tokens=4)
    two = ChatKVCache(store=str(tmp_path), max_tokens=8)
    other = ChatKVCache(max_tokens=4)
    held = one.running
    assert two.running is held
    assert other.running is not held
    assert copy.deepcopy(one).running is held
    assert one.model_copy(update={"temperature": 1.0}).running is held
    there = pickle.loads(pickle.dumps(one))
    assert there.running is held
    assert there.invoke("Why?").content == one.invoke("Why?").content
    del one, two, there
    gc.collect()
    assert held.is_closed
    assert not other.running.is_closed


def test_an_engine_that_was_given_is_not_ours_to_close(bare_engine: Engine) -> None:
    model = chat(bare_engine)
    with pytest.raises(ConfigError, match="cannot be pickled; name model and store"):
        pickle.dumps(model)
    assert copy.deepcopy(model).running is bare_engine
    del model
    gc.collect()
    assert not bare_engine.is_closed


def test_the_readers_own_world(tmp_path: Path, cached: Any) -> None:
    model = ChatKVCache(store=tmp_path, max_tokens=32)
    text = "Neiia Kleiski. She lives in Naihaven. Her hobby is judo."
    known_of(model.running).add([text])
    prompt = [
        SystemMessage(f"Answer from the documents.\n\n{text}"),
        HumanMessage("Where does Neiia Kleiski live?"),
    ]
    first, second = model.invoke(prompt), model.invoke(prompt)
    assert "Naihaven" in first.content
    assert second.content == first.content
    assert cached(second) >= 0.95 * len(model.get_token_ids(text))


# ---- documents


def test_documents_of_a_tools_artifact_are_known(engine: Engine, documents: list[str], cached: Any) -> None:
    from langchain_core.documents import Document

    model = chat(engine)
    call = {"name": "look", "args": {}, "id": "1", "type": "tool_call"}
    messages = [
        HumanMessage("Why?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage(documents[0], tool_call_id="1", artifact=[Document(documents[0])]),
    ]
    before, after = model.invoke(messages), model.invoke(messages)
    assert before.content == after.content
    assert cached(after) - cached(before) == len(model.get_token_ids(documents[0]))


def test_one_line_says_why_a_retrieved_document_was_not_used(
    engine: Engine, documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda
    from langchain_core.vectorstores import InMemoryVectorStore

    from langchain_kvrag import LexicalEmbeddings

    retriever = InMemoryVectorStore.from_documents(
        [Document(documents[0])], LexicalEmbeddings()
    ).as_retriever()
    chain = retriever | RunnableLambda(lambda found: found[0].page_content.upper()) | chat(engine)
    with caplog.at_level(logging.DEBUG, logger="langchain_kvrag"):
        chain.invoke("lighthouse")
    lines = [r.getMessage() for r in caplog.records if r.name == "langchain_kvrag"]
    assert len(lines) == 1
    assert "1 retrieved documents were not used" in lines[0]
    assert "in another letter case" in lines[0]


def test_a_policy_may_be_given_for_one_call(engine: Engine, documents: list[str]) -> None:
    known_of(engine).add(documents)
    told = chat(engine).invoke(over(documents), policy=Policy(name="mine")).response_metadata["kvrag"]
    assert told["policy"] == "mine"
