"""Between retriever and prompt: loading early, leaving out, writing back; for chains and for agents."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.tools import tool
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough

from kvrag import ConfigError, Engine
from kvrag.ingested import known_of
from langchain_kvrag import ChatKVCache, KVCacheCompressor, KVCacheMiddleware, KVCacheRetriever, relevance
from langchain_kvrag._hints import WATCH, prefetch_of
from langchain_kvrag.middleware import LEFT_OUT

FORM = ChatPromptTemplate.from_messages([("system", "Answer.\n\n{context}"), ("human", "{input}")])


class Stored(BaseRetriever):
    """Returns the documents that it holds themselves, as BM25 and others do."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents


@pytest.fixture
def model(engine: Engine) -> ChatKVCache:
    return ChatKVCache(engine=engine, max_tokens=16, max_json_chars=8)


@pytest.fixture
def base(documents: list[str]) -> Stored:
    return Stored(documents=[Document(text, metadata={"n": n}) for n, text in enumerate(documents)])


def retrieved_with(how: str, model: ChatKVCache, base: Stored) -> Any:
    compressor = KVCacheCompressor(model=model)
    if how == "wrapper":
        return KVCacheRetriever(base=base, compressor=compressor)
    if how == "compression":
        return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=base)
    return base | compressor.as_runnable()


HOW = pytest.mark.parametrize("how", ["wrapper", "compression", "runnable"])


def chain_of(how: str, model: ChatKVCache, base: Stored) -> Any:
    retriever = retrieved_with(how, model, base)
    if how == "runnable":  # create_retrieval_chain hands the question to retrievers only
        found = (lambda given: given["input"]) | retriever
        return RunnablePassthrough.assign(context=found) | RunnablePassthrough.assign(
            answer=create_stuff_documents_chain(model, FORM)
        )
    return create_retrieval_chain(retriever, create_stuff_documents_chain(model, FORM))


@HOW
def test_the_chains_documents_say_what_the_answer_made_of_them(
    how: str, model: ChatKVCache, base: Stored
) -> None:
    chain = chain_of(how, model, base)
    first, second = chain.invoke({"input": "Why?"}), chain.invoke({"input": "Why?"})
    fields = [document.metadata["kvrag"] for document in second["context"]]
    assert [field["has_cache"] for field in fields] == [True] * 4
    assert [d.metadata["kvrag"]["has_cache"] for d in first["context"]] == [False] * 4
    assert all(field["is_hit"] for field in fields)
    assert sum(field["focus"] for field in fields) == pytest.approx(1.0, abs=1e-3)
    assert [document.metadata["n"] for document in second["context"]] == [0, 1, 2, 3]
    assert all("kvrag" not in document.metadata for document in base.documents)


@HOW
async def test_requests_at_once_get_their_own_fields(how: str, model: ChatKVCache, base: Stored) -> None:
    chain, under_way = chain_of(how, model, base), WATCH.num_runs
    done = await asyncio.gather(
        *(chain.ainvoke({"input": question}) for question in ("Why?", "Who?", "Why?"))
    )
    told = [[d.metadata["kvrag"]["mass"] for d in one["context"]] for one in done]
    assert told[0] == pytest.approx(told[2], rel=1e-3)
    assert told[0] != told[1]
    assert WATCH.num_runs == under_way


def test_what_fits_nowhere_is_left_out(model: ChatKVCache, documents: list[str]) -> None:
    given = [Document(documents[0]), Document("a" * 5000), Document(""), Document(documents[1])]
    kept = KVCacheCompressor(model=model).compress_documents(given, "")
    assert [document.page_content for document in kept] == documents[:2]
    length = model.get_num_tokens(documents[0])
    some = KVCacheCompressor(model=model, max_tokens=length + 1).compress_documents(given, "")
    assert [document.page_content for document in some] == documents[:1]
    assert some[0].metadata["kvrag"]["num_tokens"] == length


def test_a_budget_without_room_says_so(engine: Engine) -> None:
    model = ChatKVCache(engine=engine, max_tokens=4000)
    with pytest.raises(ConfigError, match="no tokens are left for documents"):
        KVCacheCompressor(model=model).compress_documents([Document("a")], "")


def test_a_hint_loads_what_the_store_has(model: ChatKVCache, engine: Engine, documents: list[str]) -> None:
    known_of(engine).add(documents[:2])
    model.invoke("\n\n".join(documents[:2]))
    prefetch_of(engine).wait()
    before = prefetch_of(engine).loaded
    KVCacheCompressor(model=model).compress_documents([Document(text) for text in documents], "")
    prefetch_of(engine).wait()
    assert prefetch_of(engine).loaded - before == 2


def test_any_retriever_gives_the_hint(model: ChatKVCache, engine: Engine, base: Stored) -> None:
    assert base.documents[0].page_content not in known_of(engine)
    base.invoke("Why?")
    assert base.documents[0].page_content in known_of(engine)


def test_relevance_works_for_chains_that_keep_the_message(
    model: ChatKVCache, engine: Engine, documents: list[str]
) -> None:
    known_of(engine).add(documents[:2])
    answer = model.invoke("\n\n".join(documents[:2]))
    told = relevance(answer, [Document(text) for text in documents[:3]])
    assert [set(d.metadata["kvrag"]) > {"mass", "focus"} for d in told] == [True, True, False]
    assert relevance(AIMessage("from another model"), told[:1])[0].metadata == told[0].metadata


# ---- agents


def agent_of(model: ChatKVCache, found: list[Document], **limits: Any) -> Any:
    @tool(response_format="content_and_artifact")
    def look(query: str) -> tuple[str, list[Document]]:
        """Find documents."""
        return "\n\n".join(f"Content: {document.page_content}" for document in found), found

    class Calling(ChatKVCache):
        def _asked(self, messages: Any, stop: Any, options: dict[str, Any], run_manager: Any) -> Any:
            forced = options.get("tools") and isinstance(messages[-1], HumanMessage)
            return super()._asked(
                messages, stop, {**options, "tool_choice": "look"} if forced else options, run_manager
            )

    calls = Calling(engine=model.engine, max_tokens=96, max_json_chars=8)
    middleware = KVCacheMiddleware(KVCacheCompressor(model=calls, **limits))
    return create_agent(calls, [look], middleware=[middleware])


def artifact(done: dict[str, Any]) -> ToolMessage:
    (message,) = [m for m in done["messages"] if isinstance(m, ToolMessage)]
    return message


async def test_an_agents_documents_say_what_the_answer_made_of_them(model: ChatKVCache, base: Stored) -> None:
    agent = agent_of(model, base.documents)
    asked = {"messages": [HumanMessage("Why?")]}
    for done in (agent.invoke(asked), await agent.ainvoke(asked)):
        told = artifact(done).artifact
        assert [d.page_content for d in told] == [d.page_content for d in base.documents]
        assert sum(d.metadata["kvrag"]["focus"] for d in told) == pytest.approx(1.0, abs=1e-3)
    assert all(d.metadata["kvrag"]["is_hit"] for d in told)
    assert all("kvrag" not in document.metadata for document in base.documents)


def test_an_agents_documents_that_do_not_fit_are_left_out(model: ChatKVCache, base: Stored) -> None:
    length = model.get_num_tokens(base.documents[0].page_content)
    done = agent_of(model, base.documents[:2], max_tokens=length).invoke({"messages": [HumanMessage("Why?")]})
    message = artifact(done)
    assert [d.metadata["n"] for d in message.artifact] == [0]
    assert message.content == f"Content: {base.documents[0].page_content}\n\nContent: {LEFT_OUT}"
