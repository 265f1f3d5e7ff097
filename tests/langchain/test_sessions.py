"""Conversations in sessions: only what is new is read, whichever way LangChain hands the history over."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, messages_to_dict
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph

from kvrag import ConfigError, Engine, Sampling, SessionError
from kvrag.memory.window import Window
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer
from langchain_kvrag import ChatKVCache, KVCacheLLM
from langchain_kvrag._messages import template_messages

Make = Callable[..., ChatKVCache]
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse of Varn?", "Since when?"]


@pytest.fixture
def make(engine: Engine, tmp_path: Path) -> Make:
    """Models that share the engine and a folder of sessions."""

    def made(**fields: Any) -> ChatKVCache:
        chosen = {"sessions": tmp_path / "chats", "memory": Window(64), "max_tokens": 6, **fields}
        return ChatKVCache(engine=engine, **chosen)

    return made


def thread(name: Any) -> Any:
    return {"configurable": {"thread_id": name}}


def use(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = message.response_metadata["kvrag"]["memory"]
    return found


def new_tokens(engine: Engine, history: list[BaseMessage], tools: Any = None) -> int:
    """Tokens that the last messages add behind the last answer."""
    last = max(i for i, m in enumerate(history) if isinstance(m, AIMessage))
    marked = [*history[:last], AIMessage("\u2063"), *history[last + 1 :]]
    return engine.count_tokens(engine.render(template_messages(marked), tools).rpartition("\u2063")[2])


def reads(engine: Engine, talk: Callable[[list[BaseMessage]], AIMessage]) -> list[BaseMessage]:
    """A growing history, of which every turn has read what is new, and no more."""
    history: list[BaseMessage] = [SystemMessage("Be brief.")]
    for said in SAID:
        history.append(HumanMessage(said))
        answer = talk(history)
        told = use(answer)
        if len(history) > 2:
            assert told["read"] == new_tokens(engine, history)
            assert answer.usage_metadata is not None
            counts = answer.usage_metadata
            assert counts["input_tokens"] - counts["input_token_details"]["cache_read"] == told["read"]
        assert (told["went_back"], told["anew"]) == (0, False)
        assert told["remembered"] + told["forgotten"] == told["said"]
        history.append(answer)
    assert told["forgotten"] > 0
    assert told["remembered"] < told["said"]
    return history


def directly(engine: Engine, **options: Any) -> list[str]:
    """The answers of a session that is driven without LangChain."""
    session = engine.session(Window(64), **options)
    history: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for said in SAID:
        history.append({"role": "user", "content": said})
        text = session.reply_to(history, sampling=Sampling(max_new_tokens=6)).text
        history.append({"role": "assistant", "content": text})
    return [message["content"] for message in history[2::2]]


def test_only_what_is_new_is_read(engine: Engine, make: Make) -> None:
    model = make()
    history = reads(engine, lambda said: model.invoke(said, thread("jane")))
    assert [m.content for m in history[2::2]] == directly(engine)
    assert history[-1].response_metadata["kvrag"]["session"] == "jane"


def test_streams_are_turns_too(engine: Engine, make: Make) -> None:
    model = make(session="jane")

    def streamed(history: list[BaseMessage]) -> AIMessage:
        chunks = list(model.stream(history))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole = whole + chunk
        assert len([c for c in chunks if c.usage_metadata]) == 1
        return AIMessage(
            whole.content, response_metadata=whole.response_metadata, usage_metadata=whole.usage_metadata
        )

    assert [m.content for m in reads(engine, streamed)[2::2]] == directly(engine)


def test_asynchronous_turns(engine: Engine, make: Make) -> None:
    model = make()

    def asked(history: list[BaseMessage]) -> AIMessage:
        return asyncio.run(model.ainvoke(history, thread("jane")))

    assert [m.content for m in reads(engine, asked)[2::2]] == directly(engine)


def test_nothing_changes_without_sessions(engine: Engine, bare_engine: Engine) -> None:
    model = ChatKVCache(engine=engine, max_tokens=6)
    answer = model.invoke(SAID[0], thread("jane"))
    assert "memory" not in answer.response_metadata["kvrag"]
    with_sessions = ChatKVCache(engine=engine, max_tokens=6, sessions="unused")
    without_thread = with_sessions.invoke(SAID[0])
    assert "memory" not in without_thread.response_metadata["kvrag"]
    assert not Path("unused").exists()
    assert without_thread.content == answer.content


def test_a_call_may_name_its_session(engine: Engine, make: Make) -> None:
    model = make(session="jane")
    assert model.invoke(SAID[0]).response_metadata["kvrag"]["session"] == "jane"
    assert model.bind(session="ann").invoke(SAID[0]).response_metadata["kvrag"]["session"] == "ann"
    assert "memory" not in model.bind(session=None).invoke(SAID[0]).response_metadata["kvrag"]
    own = engine.session(Window(64), name="own")
    assert model.invoke(SAID[0], session=own).response_metadata["kvrag"]["session"] == "own"
    assert own.num_turns == 1
    other = model.model_copy(update={"session": "bob"})
    assert other.invoke(SAID[0]).response_metadata["kvrag"]["session"] == "bob"
    bound = ChatKVCache(engine=engine, session=own, max_tokens=6)
    assert bound.invoke([HumanMessage(SAID[0])]).response_metadata["kvrag"]["memory"]["went_back"] == 1
    kept_in_memory = ChatKVCache(engine=engine, session="jane", memory="window", memory_budget=64)
    assert kept_in_memory.invoke(SAID[0], max_tokens=6).response_metadata["kvrag"]["session"] == "jane"


def test_edits_and_regeneration(engine: Engine, make: Make) -> None:
    model = make()
    history = reads(engine, lambda said: model.invoke(said, thread("jane")))
    again = model.invoke(history[:-1], thread("jane"))
    assert again.content == history[-1].content
    assert use(again)["went_back"] == 1
    edited = [*history[:1], HumanMessage("Where was the ferry?"), *history[2:-1]]
    answer = model.invoke(edited, thread("jane"))
    assert use(answer)["anew"]
    assert answer.content == model.invoke(edited, thread("fresh")).content


def test_batches_of_threads(engine: Engine, make: Make) -> None:
    model = make()
    configs = [thread(name) for name in ("a", "b", "c")]
    firsts = model.batch([SAID[0], SAID[1], SAID[2]], configs)
    histories = [[HumanMessage(said), first] for said, first in zip(SAID, firsts, strict=False)]
    seconds = model.batch([[*h, HumanMessage("Why?")] for h in histories], configs)
    for first, second, name in zip(firsts, seconds, ("a", "b", "c"), strict=True):
        assert first.response_metadata["kvrag"]["session"] == name
        assert not use(second)["anew"]
        assert use(second)["read"] < use(first)["said"] + 20


def test_two_threads_at_once(engine: Engine, make: Make) -> None:
    model, found = make(), {}

    def talk(name: str) -> None:
        found[name] = [m.content for m in reads(engine, lambda said: model.invoke(said, thread(name)))[2::2]]

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("a", "b", "c")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == dict.fromkeys("abc", directly(engine))


def test_the_event_loop_goes_on(make: Make) -> None:
    model = make(max_tokens=60, session="jane")

    async def main() -> int:
        ticks, done = 0, asyncio.create_task(model.ainvoke(SAID[0]))
        while not done.done():
            await asyncio.sleep(0)
            ticks += 1
        await done
        return ticks

    assert asyncio.run(main()) > 20


@pytest.fixture(params=["memory", "sqlite"])
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield InMemorySaver()
        return
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as made:
        yield made


def chatbot(model: ChatKVCache, saver: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("bot", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "bot")
    return graph.compile(checkpointer=saver)


def test_a_graph_with_a_checkpointer(engine: Engine, make: Make, saver: Any) -> None:
    graph = chatbot(make(), saver)
    for number, said in enumerate(SAID):
        messages = graph.invoke({"messages": [("user", said)]}, thread(7))["messages"]
        told = use(messages[-1])
        assert messages[-1].response_metadata["kvrag"]["session"] == "7"
        assert (told["went_back"], told["anew"]) == (0, False)
        if number:
            assert told["read"] == new_tokens(engine, messages[:-1])


def branched_config(graph: Any) -> Any:
    """Where a thread's newest branch ends."""
    return graph.get_state(thread("jane")).config


def test_going_back_to_an_earlier_checkpoint(make: Make, saver: Any) -> None:
    graph = chatbot(make(), saver)
    for said in SAID[:3]:
        graph.invoke({"messages": [("user", said)]}, thread("jane"))
    past = next(s for s in graph.get_state_history(thread("jane")) if len(s.values["messages"]) == 4)
    branched = graph.invoke({"messages": [("user", "Another question?")]}, past.config)["messages"]
    assert len(branched) == 6
    assert use(branched[-1])["went_back"] == 1
    for said in [*SAID[:2], "Another question?"]:
        straight = graph.invoke({"messages": [("user", said)]}, thread("other"))["messages"]
    assert straight[-1].content == branched[-1].content
    latest = graph.invoke({"messages": [("user", "And?")]}, branched_config(graph))["messages"]
    assert (use(latest[-1])["went_back"], use(latest[-1])["anew"]) == (0, False)


def test_a_history_that_a_runnable_keeps(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what many use
        from langchain_core.chat_history import InMemoryChatMessageHistory
        from langchain_core.runnables.history import RunnableWithMessageHistory

        kept: dict[str, Any] = {}

        def history_of(session_id: str) -> Any:
            return kept.setdefault(session_id, InMemoryChatMessageHistory())

        chain = RunnableWithMessageHistory(make(), history_of)
        for number, said in enumerate(SAID):
            answer: Any = chain.invoke([HumanMessage(said)], {"configurable": {"session_id": "jane"}})
            assert answer.response_metadata["kvrag"]["session"] == "jane"
            assert not use(answer)["anew"]
            assert use(answer)["went_back"] == 0
            assert not number or use(answer)["read"] < 40


def find_boats(name: str) -> str:
    """Find a boat."""
    return f"The boat {name} lies at the pier."


class CallsFirst(ChatKVCache):
    """Calls a tool as long as the last message is the user's: a random model would not choose to."""

    def _asked(self, messages: Any, stop: Any, options: Any, run_manager: Any) -> Any:
        if "tools" in options:
            options["tool_choice"] = "any" if isinstance(messages[-1], HumanMessage) else "auto"
        return super()._asked(messages, stop, options, run_manager)


def test_an_agents_tool_loop(engine: Engine, tmp_path: Path) -> None:
    model = CallsFirst(
        engine=engine, sessions=tmp_path / "chats", memory=Window(600), max_tokens=80, max_json_chars=8
    )
    agent = create_agent(
        model, [tool(find_boats)], system_prompt="You know boats.", checkpointer=InMemorySaver()
    )
    for number in range(2):
        messages = agent.invoke({"messages": [("user", SAID[number])]}, thread("jane"))["messages"]
        called, answered = messages[-3], messages[-1]
        assert called.tool_calls
        for message in (called, answered):
            assert (use(message)["went_back"], use(message)["anew"]) == (0, False)
        assert use(answered)["read"] < use(called)["said"]
    told = [use(m)["read"] for m in messages if isinstance(m, AIMessage)]
    assert max(told) < 100, "the tools are pinned, and each call reads its own message"


def test_a_graph_in_a_tool_has_its_own_session(make: Make) -> None:
    model = make()
    inner = chatbot(model, None)
    outer = StateGraph(MessagesState)
    outer.add_node("bot", lambda state: {"messages": [model.invoke(state["messages"])]})
    outer.add_node("team", inner)
    outer.add_edge(START, "bot")
    outer.add_edge("bot", "team")
    messages = outer.compile(checkpointer=InMemorySaver()).invoke(
        {"messages": [("user", SAID[0])]}, thread("jane")
    )["messages"]
    named = [m.response_metadata["kvrag"]["session"] for m in messages if isinstance(m, AIMessage)]
    assert named == ["jane", "jane/team"]


RESUMED = """
import json, sys
from langchain_core.messages import messages_from_dict
from langchain_kvrag import ChatKVCache
from kvrag.memory.window import Window

folder, model, history = sys.argv[1:]
chat = ChatKVCache(model=model, sessions=folder, memory=Window(64), max_tokens=6)
answer = chat.invoke(messages_from_dict(json.loads(history)), {"configurable": {"thread_id": "jane"}})
print(json.dumps([answer.content, answer.response_metadata["kvrag"]["memory"]]))
"""


def test_a_thread_is_resumed_in_a_new_process(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    folder = str(tmp_path / "chats")
    model = ChatKVCache(model=str(tmp_path / "tiny"), sessions=folder, memory=Window(64), max_tokens=6)
    history: list[BaseMessage] = [HumanMessage(SAID[0])]
    history += [model.invoke(history, thread("jane")), HumanMessage(SAID[1])]
    expected = model.invoke(history, thread("uninterrupted"))
    uninterrupted = model.invoke(history[:1], thread("twice")), model.invoke(history, thread("twice"))
    del model
    gc.collect()
    assert any(Path(folder).glob("*.session")), "the last one to hold the model has written its sessions"
    told = json.dumps(messages_to_dict(history))
    done = subprocess.run(
        [sys.executable, "-c", RESUMED, folder, str(tmp_path / "tiny"), told],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, memory = json.loads(done.stdout.splitlines()[-1])
    assert text == uninterrupted[1].content
    assert memory["read"] == use(uninterrupted[1])["read"] < use(expected)["read"]
    assert (memory["went_back"], memory["anew"]) == (0, False)


def test_a_text_models_session(engine: Engine, tmp_path: Path) -> None:
    model = KVCacheLLM(engine=engine, sessions=tmp_path / "texts", memory=Window(64), max_tokens=6)
    first = "Question: where is the ferry?\nAnswer:"
    answer = model.invoke(first, thread("jane"))
    second = f"{first}{answer}\nQuestion: why?\nAnswer:"
    told = model.generate([second], metadata={"thread_id": "jane"}).generations[0][0].generation_info
    assert told is not None
    assert told["kvrag"]["memory"]["read"] == engine.count_tokens("\nQuestion: why?\nAnswer:")
    texts = model.batch([first, second], [thread("a"), thread("b")])
    assert texts[0] == answer
    assert engine.session(Window(64)).reply_to(first, sampling=Sampling(max_new_tokens=6)).text == answer


def test_pinned_documents_and_what_a_prompt_pastes(engine: Engine, make: Make, documents: list[str]) -> None:
    """Pinned documents come from the store; those in a message are text, and read once."""
    pinned = make(session_options={"documents": documents[:2], "system": "Answer from these."})
    answer = pinned.invoke(SAID[0], thread("jane"))
    assert use(answer)["pinned"] > sum(engine.count_tokens(d) for d in documents[:2])
    assert engine.store is not None
    assert engine.store.stats().entries >= 2
    pasted = make(sessions=None, session="x").invoke(f"{documents[3]}\n\n{SAID[0]}")
    assert use(pasted)["read"] > engine.count_tokens(documents[3])
    assert pasted.response_metadata["kvrag"]["documents"] == []


def test_settings_that_cannot_work(engine: Engine, make: Make, tmp_path: Path) -> None:
    with Engine(tiny()) as other, pytest.raises(ValueError, match="belongs to another engine"):
        ChatKVCache(engine=engine, session=other.session(Window(64)))
    with pytest.raises(ValueError, match="session is 3"):
        make(session=3)
    with pytest.raises(ValueError, match="sessions is a int"):
        make(sessions=3)
    with pytest.raises(ValueError, match="give one of both"):
        make(session=engine.session(Window(64)))
    with pytest.raises(ConfigError, match="session is ''"):
        make().invoke(SAID[0], session="")
    first = make()
    first.invoke(SAID[0], thread("jane"))
    with pytest.raises(ConfigError, match="were opened with"):
        make(memory=Window(32)).invoke(SAID[0], thread("jane"))
    with engine.sessions(tmp_path / "open", Window(64)) as opened:
        make(sessions=opened, memory="cascade").invoke(SAID[0], thread("jane"))
        assert "jane" in opened
        with pytest.raises(ValueError, match="have their own"):
            make(sessions=opened)
    with pytest.raises(SessionError, match="were closed"):
        make(sessions=opened, memory="cascade").invoke(SAID[0], thread("jane"))
