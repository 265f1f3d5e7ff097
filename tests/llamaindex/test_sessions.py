"""Chat engines, memory and agents of LlamaIndex in sessions: only what is new is read."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer, Memory
from llama_index.core.tools import FunctionTool

from kvrag import ConfigError, Engine, Sampling
from kvrag.memory.window import Window
from kvrag.testing.models import tiny
from llama_index.embeddings.kvrag import LexicalEmbedding
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.memory.kvrag import KVCacheMemoryBlock

Make = Callable[..., KVCacheLLM]
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse of Varn?", "Since when?"]


@pytest.fixture
def talk(make: Make, tmp_path: Path) -> Make:
    """Models that share the engine and a folder of sessions."""

    def made(session: Any = "jane", **fields: Any) -> KVCacheLLM:
        return make(**{"sessions": tmp_path / "chats", "memory": Window(40), **fields}).in_session(session)

    return made


def use(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = response.raw["kvrag"]["memory"]
    return found


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def new_tokens(engine: Engine, said: str) -> int:
    """Tokens that a message adds behind an answer."""
    talked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\u2063"}]
    text = engine.render([*talked, {"role": "user", "content": said}])
    return engine.count_tokens(text.rpartition("\u2063")[2])


def check(engine: Engine, told: list[dict[str, Any]]) -> None:
    """Every turn but the first has read its message only."""
    assert [memory["read"] for memory in told[1:]] == [new_tokens(engine, said) for said in SAID[1:]]
    assert not any(memory["anew"] or memory["went_back"] for memory in told)
    assert told[-1]["forgotten"] > 0


def directly(engine: Engine) -> list[str]:
    """The answers of a session that is driven without LlamaIndex."""
    session, sampling = engine.session(Window(40)), Sampling(max_new_tokens=12)
    return [session.send(said, sampling=sampling).text for said in SAID]


def test_histories_are_continued(engine: Engine, talk: Make) -> None:
    llm, history, told, texts = talk(), [], [], []
    for number, said in enumerate(SAID):
        history.append(user(said))
        response = llm.chat(history) if number % 2 else asyncio.run(llm.achat(history))
        told.append(use(response))
        texts.append(response.message.content)
        assert response.raw["kvrag"]["session"] == "jane"
        usage = response.raw["usage"]
        read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        assert read == told[-1]["read"] + told[-1]["pinned_read"]
        history.append(response.message)
    check(engine, told)
    assert texts == directly(engine)


def test_streams(engine: Engine, talk: Make) -> None:
    llm, history, told = talk(), [], []
    for said in SAID:
        history.append(user(said))
        last = list(llm.stream_chat(history))[-1]
        told.append(use(last))
        history.append(last.message)
    check(engine, told)
    assert [m.content for m in history[1::2]] == directly(engine)


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_simple_chat_engine(engine: Engine, talk: Make, heard: Any, is_streaming: bool) -> None:
    """Streaming, LlamaIndex puts the answer into its memory without the white space around it."""
    chat = SimpleChatEngine.from_defaults(llm=talk(), memory=ChatMemoryBuffer.from_defaults(token_limit=2000))
    for said in SAID:
        if is_streaming:
            response = chat.stream_chat(said)
            assert "".join(response.response_gen)
        else:
            chat.chat(said)
    check(engine, [use(answer) for answer in heard.answers()])
    assert [m.content.strip() for m in chat.chat_history[1::2]] == [t.strip() for t in directly(engine)]


def test_memory_and_its_block(engine: Engine, talk: Make, heard: Any, tmp_path: Path) -> None:
    """As long as nothing leaves the short-term memory, only what is new is read."""
    llm = talk()
    block = KVCacheMemoryBlock(llm=llm, path=tmp_path / "memory")

    async def main() -> None:
        memory = Memory.from_defaults(
            session_id="jane", token_limit=2000, tokenizer_fn=llm.tokenize, memory_blocks=[block]
        )
        chat = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
        for said in SAID:
            await chat.achat(said)
        await memory.sql_store._async_engine.dispose()

    asyncio.run(main())
    check(engine, [use(answer) for answer in heard.answers()])
    block.close()


def test_a_context_that_changes_is_read_anew(engine: Engine, talk: Make, heard: Any) -> None:
    """It stands in the system prompt, in front of all that was said."""
    texts = ["The ferry to Mirrow leaves at nine.", "The lighthouse of Varn was built in 1871."]
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in texts], embed_model=LexicalEmbedding()
    )
    llm = talk()

    def engine_of(llm: KVCacheLLM) -> ContextChatEngine:
        # Its own choice of a memory leaves database connections open.
        memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
        return ContextChatEngine.from_defaults(index.as_retriever(similarity_top_k=1), llm=llm, memory=memory)

    chat = engine_of(llm)
    chat.chat("When does the ferry leave?")
    chat.chat("When was the lighthouse built?")
    told = [use(answer) for answer in heard.answers()]
    assert told[1]["anew"]
    assert told[1]["read"] > new_tokens(engine, "When was the lighthouse built?")
    chat.reset()
    without = engine_of(llm.in_session(None))
    without.chat("When does the ferry leave?")
    assert heard.answers()[-1].raw["kvrag"]["documents"], "from caches instead"


def test_a_context_that_changes_is_swapped_if_it_may(engine: Engine, talk: Make, heard: Any) -> None:
    """The nodes come from caches, and of what was said only what is new is read."""
    texts = ["The ferry to Mirrow leaves at nine.", "The lighthouse of Varn was built in 1871."]
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in texts], embed_model=LexicalEmbedding()
    )
    asked = ["When does the ferry leave?", "When was the lighthouse built?"] * 2
    read = {}
    for swaps in (True, False):
        llm = talk(
            f"jane {swaps}", memory=Window(80), session_options={"swaps_opening": swaps}, sessions=None
        )
        memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
        retriever = index.as_retriever(similarity_top_k=1)
        chat = ContextChatEngine.from_defaults(retriever, llm=llm, memory=memory)
        for question in asked:
            chat.chat(question)
        answers = [answer.raw["kvrag"] for answer in heard.answers()[-4:]]
        told = [answer["memory"] for answer in answers]
        read[swaps] = sum(one["read"] + one["pinned_read"] for one in told[2:])
        assert [one["anew"] for one in told] == [False, *[not swaps] * 3]
        if swaps:
            assert [one["read"] for one in told[1:]] == [new_tokens(engine, q) for q in asked[1:]]
            assert all(document["is_hit"] for answer in answers[2:] for document in answer["documents"])
            assert all(answer["documents"] for answer in answers)
    assert read[True] < read[False]


def find_boat(name: str) -> str:
    """Find a boat."""
    return f"The boat {name} lies at the pier."


class CallsFirst(KVCacheLLM):
    """Calls a tool as long as the last message is the user's: a random model would not choose to."""

    def _converse(self, messages: Any, options: Any) -> Any:
        if options.get("tools"):
            options = {**options, "tool_choice": "any" if messages[-1].role == "user" else "auto"}
        return super()._converse(messages, options)


# The workflow library looks at all names of an agent, those that pydantic deprecates included.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.parametrize("is_plain", [True, False])
def test_an_agents_tool_loop(reader: Any, heard: Any, is_plain: bool) -> None:
    """The reader's template puts a space in front of calls, which their form does not."""
    engine = Engine(tiny() if is_plain else reader)
    llm = CallsFirst(engine=engine, session="jane", memory=Window(700), max_tokens=120, max_string=8)
    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(find_boat)], llm=llm, system_prompt="You know boats."
    )

    async def main() -> None:
        memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
        for said in SAID[:2]:
            await agent.run(user_msg=said, memory=memory)

    asyncio.run(main())
    told = [use(answer) for answer in heard.answers()]
    assert len(told) == 4
    engine.close()
    assert not any(memory["anew"] for memory in told)
    assert not any(memory["went_back"] for memory in told)
    assert max(memory["read"] for memory in told) < told[0]["pinned"] / 2, (
        "tools are pinned, and each call reads what is new"
    )


def test_edits_and_regeneration(engine: Engine, talk: Make) -> None:
    llm, history = talk(), []
    for said in SAID[:3]:
        history += [user(said), llm.chat([*history, user(said)]).message]
    again = llm.chat(history[:-1])
    assert again.message.content == history[-1].content
    assert use(again)["went_back"] == 1
    edited = [user("Where was the ferry?"), *history[1:-1]]
    anew = llm.chat(edited)
    assert use(anew)["anew"]
    assert anew.message.content == talk("other").chat(edited).message.content


def test_single_prompts_are_no_turns(talk: Make) -> None:
    llm = talk()
    llm.chat([user(SAID[0])])
    assert "memory" not in llm.complete("Why?").raw["kvrag"]
    response = llm.chat([user(SAID[0])], session="other")
    assert response.raw["kvrag"]["session"] == "other"
    assert "memory" not in llm.chat([user(SAID[0])], session=None).raw["kvrag"]


def test_sessions_at_once(engine: Engine, talk: Make) -> None:
    found: dict[str, list[str]] = {}

    def converse(name: str) -> None:
        chat = SimpleChatEngine.from_defaults(llm=talk(name))
        found[name] = [str(chat.chat(said)) for said in SAID]

    threads = [threading.Thread(target=converse, args=(name,)) for name in "abc"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == dict.fromkeys("abc", directly(engine))


def test_the_event_loop_goes_on(talk: Make) -> None:
    llm = talk(max_tokens=60)

    async def main() -> int:
        ticks, done = 0, asyncio.create_task(llm.achat([user(SAID[0])]))
        while not done.done():
            await asyncio.sleep(0)
            ticks += 1
        await done
        return ticks

    assert asyncio.run(main()) > 20


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Callable[[], KVCacheLLM]]:
    """Models that load an engine of their own, as another process would."""

    def made() -> KVCacheLLM:
        return KVCacheLLM(session="jane", sessions=str(tmp_path / "apart"), memory=Window(40), max_tokens=12)

    yield made
    gc.collect()


def test_a_session_outlives_its_model(engine: Engine, apart: Callable[[], KVCacheLLM]) -> None:
    llm, history, told = apart(), [], []
    for said in SAID:
        history.append(user(said))
        response = llm.chat(history)
        told.append(use(response))
        history.append(response.message)
        del llm, response
        gc.collect()  # nobody holds the engine any more
        llm = apart()
    llm.running.close()
    check(engine, told)
    assert [m.content for m in history[1::2]] == directly(engine)


def test_settings_that_cannot_work(engine: Engine, talk: Make) -> None:
    with pytest.raises(ConfigError, match="session is 3"):
        talk(3)
    with Engine(tiny()) as other, pytest.raises(ConfigError, match="belongs to another engine"):
        KVCacheLLM(engine=engine, session=other.session(Window(40)))
    with pytest.raises(ConfigError, match="memory policy is 'none'"):
        talk(memory="none").chat([user(SAID[0])])
