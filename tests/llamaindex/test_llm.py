"""The model by itself: every method, every known pain of local models."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
)
from llama_index.core.llms import LLM, ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.prompts import PromptTemplate

import llama_index.embeddings.kvrag
import llama_index.llms.kvrag
from kvrag import ConfigError, ContextOverflow, Engine, GenerationCancelled, InputError, Model, Policy
from kvrag.focus import Pruning
from kvrag.ingested import known_of
from kvrag.testing.models import tiny_model, tiny_tokenizer
from llama_index.llms.kvrag import KVCacheLLM

HELLO = [ChatMessage(role="user", content="Hello")]
TEXT = "Neiia Kleiski. She lives in Naihaven. Her hobby is judo."
WHERE = f"{TEXT}\n\nWhere does Neiia Kleiski live?"
Make = Callable[..., KVCacheLLM]


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


async def collected(awaited: Any) -> list[Any]:
    return [piece async for piece in await awaited]


def test_public_names() -> None:
    assert llama_index.llms.kvrag.__all__ == ["KVCacheLLM"]
    assert llama_index.embeddings.kvrag.__all__ == ["LexicalEmbedding"]
    assert KVCacheLLM.class_name() == "KVCacheLLM"


def test_all_forms_give_one_answer(llm: KVCacheLLM, engine: Engine) -> None:
    expected = engine.answer([{"role": "user", "content": WHERE}]).text
    chat = [ChatMessage(role="user", content=WHERE)]
    assert llm.chat(chat).message.content == expected
    assert llm.complete(WHERE).text == expected
    assert run(llm.achat(chat)).message.content == expected
    assert run(llm.acomplete(WHERE)).text == expected
    for pieces in (
        list(llm.stream_chat(chat)),
        run(collected(llm.astream_chat(chat))),
        list(llm.stream_complete(WHERE)),
        run(collected(llm.astream_complete(WHERE))),
    ):
        assert "".join(p.delta for p in pieces) == expected == str(pieces[-1]).removeprefix("assistant: ")
        assert len(pieces) > 2, "streamed in one piece"
        assert pieces[-1].raw["usage"]["completion_tokens"] > 1


def test_every_method_is_our_own() -> None:
    """The base class's asynchronous methods block the event loop."""
    for name in "chat complete stream_chat stream_complete".split():
        for prefix in ("", "a"):
            owner = next(c for c in KVCacheLLM.__mro__ if prefix + name in vars(c))
            assert owner is KVCacheLLM
    assert inspect.iscoroutinefunction(KVCacheLLM.achat)


def test_counts(llm: KVCacheLLM, engine: Engine) -> None:
    response = llm.chat(HELLO)
    prompt = engine.model.text.render([{"role": "user", "content": "Hello"}])
    usage = response.raw["usage"]
    assert usage["prompt_tokens"] == len(llm.tokenize(prompt))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert response.additional_kwargs["prompt_tokens"] == usage["prompt_tokens"]
    assert json.loads(json.dumps(response.raw)) == response.raw, "no tensors, nothing that cannot be stored"


def test_cached_tokens_are_counted(llm: KVCacheLLM, engine: Engine) -> None:
    known_of(engine).see([TEXT])
    first, second = llm.complete(WHERE), llm.complete(WHERE)
    length = len(llm.tokenize(TEXT))
    assert first.text == second.text
    assert [d["is_hit"] for d in first.raw["kvrag"]["documents"]] == [False]
    (document,) = second.raw["kvrag"]["documents"]
    assert document["is_hit"]
    assert document["num_tokens"] == length
    assert document["focus"] > 0
    counted = second.raw["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert counted == second.additional_kwargs["cached_tokens"] >= length


def test_caches_can_be_off(make: Make, engine: Engine) -> None:
    known_of(engine).see([TEXT])
    response = make(caches=False).complete(WHERE)
    assert response.raw["kvrag"]["documents"] == []
    assert response.additional_kwargs["cached_tokens"] == 0


def test_handlers_count_tokens(make: Make) -> None:
    counter = TokenCountingHandler()
    llm = make(callback_manager=CallbackManager([counter]))
    response = llm.chat(HELLO)
    assert counter.total_llm_token_count == response.additional_kwargs["total_tokens"]


def test_events(llm: KVCacheLLM, heard: Any) -> None:
    pieces = list(llm.stream_chat(HELLO))
    kinds = [type(event) for event in heard.events]
    assert kinds[0] is LLMChatStartEvent
    assert kinds[-1] is LLMChatEndEvent
    assert kinds.count(LLMChatInProgressEvent) == len(pieces)


def test_metadata(make: Make, engine: Engine) -> None:
    told = make(max_tokens=7).metadata
    assert told.context_window == engine.model.max_length
    assert told.num_output == 7
    assert told.is_chat_model
    assert told.is_function_calling_model
    assert not make(calls_functions=False).metadata.is_function_calling_model
    assert told.model_name == "kvrag/reader"
    assert make(context_window=99).metadata.context_window == 99
    assert not make(is_chat_model=False).metadata.is_chat_model


# ---- known pains of local models


@pytest.mark.parametrize("ask", ["complete", "stream_complete", "acomplete", "astream_complete"])
def test_stop_strings_end_the_answer_and_do_not_leak(llm: KVCacheLLM, ask: str) -> None:
    whole = llm.complete("Hello").text
    stop = whole[3 : len(whole) // 2]  # of several tokens
    made: Any = getattr(llm, ask)("Hello", stop=[stop])
    if ask == "stream_complete":
        pieces = list(made)
    elif ask == "astream_complete":
        pieces = run(collected(getattr(llm, ask)("Hello", stop=[stop])))
        made.close()
    else:
        pieces = [run(made) if ask == "acomplete" else made]
    assert pieces[-1].text == whole[:3]
    assert all(stop not in p.text and whole.startswith(p.text) for p in pieces)
    assert pieces[-1].raw["finish_reason"] == "stop"


def test_special_tokens_stay_out_of_the_text(llm: KVCacheLLM, engine: Engine) -> None:
    response = llm.chat(HELLO, max_tokens=60)
    assert response.raw["finish_reason"] == "stop"
    assert not any(token in str(response) for token in engine.model.text.tokenizer.all_special_tokens)


def test_the_first_piece_comes_before_the_answer_is_whole(llm: KVCacheLLM) -> None:
    """The stream is left after one piece; a buffered one would have been read to its end by then."""
    stream = llm.stream_complete("Hello", max_tokens=2000)
    assert next(stream).delta
    stream.close()
    assert llm.complete("Hello").text, "the engine goes on"


def test_one_bos() -> None:
    """A template writes it, a text gets it, and one that has it does not get a second one."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    with Engine(Model(tiny_model("llama"), tokenizer)) as engine:
        llm = KVCacheLLM(engine=engine, max_tokens=2)
        for written in (
            llm._written(HELLO),
            llm._completing("Hello", False),
            llm._completing(f"{tokenizer.bos_token}user: Hello", True),
        ):
            asked = llm._ask(*written, {})
            list(asked.stream)
            assert asked.finish().plan.tokens.count(5) == 1


def test_the_template_is_used_or_what_stands_in_for_it(make: Make, engine: Engine) -> None:
    llm = make()
    assert llm._written(HELLO) == (engine.model.text.render([{"role": "user", "content": "Hello"}]), True)
    assert llm._completing("Hello", False) == llm._written(HELLO)
    assert llm._completing("Hello", True) == ("Hello", False)
    own = make(messages_to_prompt=lambda m: f"<{m[0].content}>", completion_to_prompt=lambda p: f"[{p}]")
    assert own._written(HELLO) == ("<Hello>", False)
    assert own._completing("Hello", False) == ("[Hello]", False)
    assert make(is_chat_model=False)._written(HELLO) == ("user: Hello\nassistant: ", False)


def test_a_model_without_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with Engine(Model(tiny_model("llama"), tokenizer)) as engine:
        llm = KVCacheLLM(engine=engine, max_tokens=3)
        assert not llm.metadata.is_chat_model
        assert llm.chat(HELLO).raw["usage"]["completion_tokens"] == 3
        assert (
            llm.predict(PromptTemplate("Say {it}"), it="hello there") == llm.complete("Say hello there").text
        )


def test_the_event_loop_is_not_blocked(llm: KVCacheLLM) -> None:
    """Between a call's start and its end the loop gets to other tasks many times."""

    async def main() -> int:
        turns = 0
        task = asyncio.create_task(llm.acomplete("Hello", max_tokens=60))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await task).text
        return turns

    assert run(main()) > 20


def test_memory_does_not_grow(llm: KVCacheLLM) -> None:
    def objects() -> int:
        gc.collect()
        return sum(type(thing).__name__ in {"Tensor", "_Job", "AnswerStream"} for thing in gc.get_objects())

    list(llm.stream_complete("Hello"))
    before = objects()
    for _ in range(5):
        list(llm.stream_complete("Hello"))
    assert objects() <= before


def test_cancelling_frees_the_engine(llm: KVCacheLLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(llm.acomplete("Hello", max_tokens=2000))
        await asyncio.sleep(0)  # it has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = await llm.astream_complete("Hello", max_tokens=2000)
        await anext(stream)
        await stream.aclose()
        del stream

    run(main())
    gc.collect()
    assert llm.complete("Hello").text
    live = [thing for thing in gc.get_objects() if type(thing).__name__ == "_Job"]
    assert all(job.is_cancelled.is_set() or job.iterator is None for job in live)


def test_requests_at_once_do_not_mix(make: Make, engine: Engine) -> None:
    people = {f"Person{i} Maro": f"Town{i}haven" for i in range(4)}
    texts = {n: f"{n}. She lives in {t}. Her hobby is judo number {t}." for n, t in people.items()}
    known_of(engine).see(texts.values())
    llm = make()
    prompts = {name: f"{text}\n\nWhere does {name} live?" for name, text in texts.items()}
    alone = {name: llm.complete(prompt) for name, prompt in prompts.items()}

    async def main() -> list[Any]:
        return await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts.values()))

    together = dict(zip(prompts, run(main()), strict=True))
    threaded: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, p=p: threaded.update({n: llm.complete(p)}))
        for n, p in prompts.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in prompts:
        for found in (together[name], threaded[name]):
            assert found.text == alone[name].text
            keys = [d["key"] for d in found.raw["kvrag"]["documents"]]
            assert keys == [d["key"] for d in alone[name].raw["kvrag"]["documents"]]
            assert len(keys) == 1


# ---- settings


def test_pickled_it_is_its_settings(tmp_path: Path) -> None:
    llm = KVCacheLLM(store=str(tmp_path), max_tokens=5, stop=["."], policy=Policy(pruning=Pruning(keep=2)))
    again = pickle.loads(pickle.dumps(llm))
    assert again._share is None
    assert again.complete("Hello").text == llm.complete("Hello").text
    assert again.running is llm.running, "equal settings are one engine"
    assert again.policy == llm.policy
    assert again.to_dict() == llm.to_dict()


def test_an_engine_does_not_travel(llm: KVCacheLLM) -> None:
    with pytest.raises(ConfigError, match="name model and store"):
        pickle.dumps(llm)


def test_it_is_made_from_its_own_description(tmp_path: Path) -> None:
    llm = KVCacheLLM(store=str(tmp_path), temperature=0.5, seed=3)
    again = KVCacheLLM.from_dict(llm.to_dict())
    assert again.to_dict() == llm.to_dict()
    assert isinstance(again, LLM)


def test_settings_that_cannot_work(make: Make, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="no policy"):
        make(policy="none such")
    with pytest.raises(ConfigError, match="temperature"):
        make(temperature=-1.0)
    with pytest.raises(ConfigError, match="beside engine"):
        make(model="other")
    with pytest.raises(ConfigError, match=r"expected a kvrag\.Engine"):
        KVCacheLLM(engine="engine")
    with pytest.raises(ConfigError, match="could not be loaded"):
        KVCacheLLM(model="nowhere/nothing")
    with pytest.raises(ConfigError, match="no option 'tempreture'"):
        make().complete("Hello", tempreture=1)


def test_calls_can_say_otherwise(make: Make) -> None:
    llm = make(temperature=1.0, seed=1)
    assert llm.complete("Hello", max_tokens=1).raw["usage"]["completion_tokens"] == 1
    assert llm.complete("Hello", temperature=0).text == make().complete("Hello").text
    assert llm.complete("Hello").text == llm.complete("Hello", seed=1).text
    assert llm.complete("Hello", policy="naive").raw["kvrag"]["policy"] == "naive"


def test_too_long_a_prompt(llm: KVCacheLLM) -> None:
    with pytest.raises(ContextOverflow):
        llm.complete("word " * 5000)


def test_a_closed_stream_is_no_answer(llm: KVCacheLLM) -> None:
    asked = llm._ask("Hello", False, {})
    asked.stream.cancel()
    with pytest.raises(GenerationCancelled):
        list(asked.stream)
    with pytest.raises(GenerationCancelled):
        asked.finish()


def test_messages_of_text_only(llm: KVCacheLLM, engine: Engine) -> None:
    blocks = [TextBlock(text="one"), TextBlock(text="two")]
    said = llm._written([ChatMessage(role=MessageRole.USER, blocks=blocks)])
    assert said == llm._written([ChatMessage(role="user", content="one\ntwo")])
    with pytest.raises(InputError, match="image"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(image=b"a")])])
    with pytest.raises(InputError, match="no messages"):
        llm.chat([])


def test_predict_and_stream(llm: KVCacheLLM) -> None:
    prompt = PromptTemplate("{text}")
    assert llm.predict(prompt, text="Hello") == llm.complete("Hello").text
    assert "".join(llm.stream(prompt, text="Hello")) == llm.complete("Hello").text
    assert run(llm.apredict(prompt, text="Hello")) == llm.complete("Hello").text
