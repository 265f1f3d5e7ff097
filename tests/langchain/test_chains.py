"""Chains and agents of the real libraries, unchanged but for the model: same answers, and from caches.

What equals what. (1) With a store and without one the composition is the same, so answers are equal to the
token, whatever the policy. (2) Under a policy that reads all rows again (`EXACT`) every answer is the one of
transformers' own `generate` for the prompt's tokens. Under the plain policy it need not be, because
documents do not see each other. Both are tested for every chain, and that on the second run nearly all tokens
of retrieved documents come from the store.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    AgentState,
    ModelRequest,
    SummarizationMiddleware,
    dynamic_prompt,
)
from langchain.tools import tool
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore, VectorStoreRetriever
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Send

from kvrag import Answer, Engine, Sampling
from kvrag.baseline import ordinary_answer
from kvrag.focus import Policy, QueryDriven
from kvrag.testing.models import tiny
from langchain_kvrag import ChatKVCache, KVCacheLLM, KVChroma, LexicalEmbeddings
from langchain_kvrag._serving import Serving

# LangChain calls its chat histories old, and users have them still.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")

EXACT = Policy(name="exact", repair=QueryDriven(1.0))
QUESTION = "When was the lighthouse of Varn built?"
FORM = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents.\n\n{context}"), ("human", "{input}")]
)
TALK = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer from these documents.\n\n{context}"),
        MessagesPlaceholder("chat_history"),
        ("human", "{input}"),
    ]
)
REWRITE = ChatPromptTemplate.from_messages(
    [MessagesPlaceholder("chat_history"), ("human", "{input}"), ("human", "Write that as a query.")]
)
HISTORY = [HumanMessage("What is in Varn?"), AIMessage("A lighthouse.")]


class Heard(BaseCallbackHandler):
    """What the model reported, call by call."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def on_llm_end(self, response: Any, **_: Any) -> None:
        made = response.generations[0][0]
        told = made.message.response_metadata if isinstance(made, ChatGeneration) else made.generation_info
        self.reports.append(told["kvrag"])


def format_docs(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


Ask = Callable[[Heard], Any]
Make = Callable[[BaseChatModel, VectorStoreRetriever], Ask]


def lcel(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    given: Any = {"context": retriever | format_docs, "input": RunnablePassthrough()}
    chain = given | FORM | model | StrOutputParser()
    return lambda heard: chain.invoke(QUESTION, {"callbacks": [heard]})


def lcel_of_text(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    text = KVCacheLLM(**{name: getattr(model, name) for name in ("engine", "caches", "policy", "max_tokens")})
    given: Any = {"context": retriever | format_docs, "input": RunnablePassthrough()}
    form = ChatPromptTemplate.from_template("Use this.\n\n{context}\n\nQuestion: {input}\nAnswer:")
    chain = given | form | text
    return lambda heard: chain.invoke(QUESTION, {"callbacks": [heard]})


def stuff(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(model, FORM))
    return lambda heard: chain.invoke({"input": QUESTION}, {"callbacks": [heard]})["answer"]


def history_aware(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    finding = create_history_aware_retriever(model, retriever, REWRITE)
    chain = create_retrieval_chain(finding, create_stuff_documents_chain(model, TALK))
    given = {"input": QUESTION, "chat_history": HISTORY}
    return lambda heard: chain.invoke(given, {"callbacks": [heard]})["answer"]


def with_history(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    def ask(heard: Heard) -> Any:
        kept = InMemoryChatMessageHistory()
        chain: Any = RunnablePassthrough.assign(context=lambda x: format_docs(retriever.invoke(x["input"])))
        talk = RunnableWithMessageHistory(
            chain | TALK | model,
            lambda _: kept,
            input_messages_key="input",
            history_messages_key="chat_history",
        )
        settings: Any = {"configurable": {"session_id": "a"}, "callbacks": [heard]}
        first = talk.invoke({"input": QUESTION}, settings)
        second = talk.invoke({"input": "And who sells bread with caraway?"}, settings)
        assert len(kept.messages) == 4
        return [first.content, second.content]

    return ask


def dynamic(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    @dynamic_prompt
    def with_context(request: ModelRequest) -> str:
        found = retriever.invoke(str(request.state["messages"][-1].text))
        return f"Answer from these documents.\n\n{format_docs(found)}"

    agent = create_agent(model, tools=[], middleware=[with_context])
    return _agent(agent)


class WithContext(AgentMiddleware[Any, Any, Any]):
    """Writes what is found into the last question, and keeps it in the agent's state."""

    class State(AgentState[Any]):
        """Messages and context."""

        context: list[Document]

    state_schema = State

    def __init__(self, retriever: VectorStoreRetriever) -> None:
        super().__init__()
        self.retriever = retriever

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any]:
        last = state["messages"][-1]
        found = self.retriever.invoke(last.text)
        said = f"{last.text}\n\nUse this context to answer:\n{format_docs(found)}"
        return {"messages": [last.model_copy(update={"content": said})], "context": found}


def rewriting(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    return _agent(create_agent(model, tools=[], middleware=[WithContext(retriever)]))


def _agent(agent: Any) -> Ask:
    def ask(heard: Heard) -> Any:
        done = agent.invoke({"messages": [HumanMessage(QUESTION)]}, {"callbacks": [heard]})
        return [message.text for message in done["messages"]]

    return ask


class Calling(ChatKVCache):
    """Calls the first tool in its first answer, as a trained model would decide to by itself."""

    def _asked(self, messages: Any, stop: Any, options: dict[str, Any], run_manager: Any) -> Any:
        if options.get("tools") and isinstance(messages[-1], HumanMessage):
            options = {**options, "tool_choice": options["tools"][0]["function"]["name"]}
        return super()._asked(messages, stop, options, run_manager)


def calling(model: BaseChatModel) -> BaseChatModel:
    names = ("engine", "caches", "policy", "max_json_chars")
    return Calling(max_tokens=96, **{name: getattr(model, name) for name in names})


def agent_with_artifact(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str) -> tuple[str, list[Document]]:
        """Find documents."""
        found = retriever.invoke(query)
        return "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in found), found

    return _agent(create_agent(calling(model), [retrieve_context], system_prompt="Use the tool."))


def agent_with_retriever_tool(model: BaseChatModel, retriever: VectorStoreRetriever) -> Ask:
    found = create_retriever_tool(retriever, "find", "Finds documents.")
    return _agent(create_agent(calling(model), [found], system_prompt="Use the tool."))


CHAINS: list[Make] = [
    lcel,
    lcel_of_text,
    stuff,
    history_aware,
    with_history,
    dynamic,
    rewriting,
    agent_with_artifact,
    agent_with_retriever_tool,
]


@pytest.fixture
def retriever(documents: list[str]) -> VectorStoreRetriever:
    store = InMemoryVectorStore.from_texts(documents, LexicalEmbeddings())
    return store.as_retriever(search_kwargs={"k": 3})


def model_of(engine: Engine, **settings: Any) -> ChatKVCache:
    return ChatKVCache(engine=engine, max_tokens=48, max_json_chars=8, **settings)


def hits(engine: Engine, report: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a prompt's documents that came from caches, and all of them."""
    used = report["documents"]
    return sum(d["num_tokens"] for d in used if d["is_hit"]), sum(d["num_tokens"] for d in used)


@pytest.mark.parametrize("make", CHAINS, ids=lambda make: make.__name__)
def test_a_chain_answers_the_same_from_caches(
    make: Make, engine: Engine, bare_engine: Engine, retriever: VectorStoreRetriever, documents: list[str]
) -> None:
    without = make(model_of(bare_engine), retriever)(Heard())
    ask, first, second = make(model_of(engine), retriever), Heard(), Heard()
    assert ask(first) == without
    assert ask(second) == without
    found = sum(len(engine.model.text.tokenize(text)) for text in documents[:1])
    cached = total = 0
    for report in second.reports:
        got, of = hits(engine, report)
        cached, total = cached + got, total + of
    assert total >= found  # the chain brought documents into the prompt, and they were found there
    assert cached >= 0.95 * total
    last = second.reports[-1]
    assert len(last["documents"]) == 3
    assert last["usage"]["cached_tokens"] >= sum(d["num_tokens"] for d in last["documents"])


@pytest.mark.parametrize("make", CHAINS, ids=lambda make: make.__name__)
def test_an_exact_policy_answers_as_full_attention_does(
    make: Make, engine: Engine, retriever: VectorStoreRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Answer] = []

    def tell(self: Serving, answer: Answer, *more: Any) -> dict[str, Any]:
        answers.append(answer)
        return told(self, answer, *more)

    told = Serving._tell
    ask = make(model_of(engine, policy=EXACT), retriever)
    ask(Heard())
    monkeypatch.setattr(Serving, "_tell", tell)
    ask(Heard())
    free = [answer for answer in answers if not answer.text.startswith('{"name"')]  # calls keep to a form
    for answer in free:
        whole = ordinary_answer(engine.model, answer.plan.tokens, Sampling(max_new_tokens=96))
        assert answer.tokens == whole.tokens[: len(answer.tokens)]
    last = answers[-1]
    assert all(use.is_hit for use in last.documents)
    assert len(last.documents) == 3
    assert last.usage.recomputed_tokens == sum(use.num_tokens for use in last.documents)


# ---- memory and checkpoints


def turns(agent: Any, thread: str) -> list[str]:
    settings: Any = {"configurable": {"thread_id": thread}}
    for question in (QUESTION, "And who sells bread with caraway?"):
        done = agent.invoke({"messages": [HumanMessage(question)]}, settings)
    return [message.text for message in done["messages"]]


@pytest.fixture(params=["memory", "sqlite"])
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield InMemorySaver()
    else:
        connection = sqlite3.connect(tmp_path / "checkpoints", check_same_thread=False)
        yield SqliteSaver(connection)
        connection.close()


def test_checkpoints_hold_text_and_no_tensors(
    saver: Any, engine: Engine, retriever: VectorStoreRetriever
) -> None:
    @tool(response_format="content_and_artifact")
    def look(query: str) -> tuple[str, list[Document]]:
        """Find documents."""
        found = retriever.invoke(query)
        return format_docs(found), found

    agent: Any = create_agent(calling(model_of(engine)), [look], checkpointer=saver)
    told = turns(agent, "a")
    assert told == turns(agent, "b")
    assert len(told) == 8
    for checkpoint in saver.list({"configurable": {"thread_id": "a"}}):
        _plain(checkpoint.checkpoint["channel_values"])
    state = agent.get_state({"configurable": {"thread_id": "b"}})
    last = state.values["messages"][-1]
    assert all(use["is_hit"] for use in last.response_metadata["kvrag"]["documents"])


def _plain(value: Any) -> None:
    """Walk through a state; everything in it is text, a number, or made of such."""
    if isinstance(value, dict):
        for inner in value.values():
            _plain(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _plain(inner)
    elif isinstance(value, Send):
        _plain(value.arg)
    elif hasattr(value, "model_dump"):
        _plain(value.model_dump())
    else:
        assert value is None or isinstance(value, (str, int, float, bool)), type(value)


def test_summaries_begin_at_a_share_of_the_window(engine: Engine) -> None:
    model = model_of(engine)
    middleware: Any = SummarizationMiddleware(model, trigger=("fraction", 0.05), keep=("messages", 1))
    agent: Any = create_agent(model, tools=[], middleware=[middleware], checkpointer=InMemorySaver())
    settings: Any = {"configurable": {"thread_id": "a"}}
    lengths = [
        len(agent.invoke({"messages": [HumanMessage(f"{QUESTION} {'again ' * 20}")]}, settings)["messages"])
        for _ in range(4)
    ]
    assert lengths[0] == 2
    assert max(lengths) < 8  # what was said before is a summary now


# ---- nobody sees another's documents


def test_chains_that_run_at_once_keep_their_documents_apart(engine: Engine, documents: list[str]) -> None:
    store = InMemoryVectorStore.from_texts(documents, LexicalEmbeddings())
    chain: Runnable[Any, Any] = (
        {"context": store.as_retriever(search_kwargs={"k": 1}) | format_docs, "input": RunnablePassthrough()}
        | FORM
        | model_of(engine)
    )
    questions = ["lighthouse of Varn", "ferry on Sundays", "bread with caraway", "northern pier"]
    alone = [chain.invoke(question) for question in questions]
    together = chain.batch(questions * 2)
    assert [m.content for m in together] == [m.content for m in alone * 2]
    keys = [[d["key"] for d in m.response_metadata["kvrag"]["documents"]] for m in together]
    assert [len(of) for of in keys] == [1] * 8
    assert keys[:4] == keys[4:]
    assert len({of[0] for of in keys}) == 4


async def test_async_chains_keep_their_documents_apart(engine: Engine, documents: list[str]) -> None:
    store = InMemoryVectorStore.from_texts(documents, LexicalEmbeddings())
    retriever = store.as_retriever(search_kwargs={"k": 1})
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(model_of(engine), FORM))
    alone = [(await chain.ainvoke({"input": text}))["answer"] for text in documents]
    together = await chain.abatch([{"input": text} for text in documents])
    assert [done["answer"] for done in together] == alone
    assert [done["context"][0].page_content for done in together] == documents


# ---- the form of LangChain's own tutorial, where only the model is ours


PEOPLE = [
    "Neiia Kleiski. She lives in Naihaven. Her hobby is judo.",
    "Peor Tools. The company sells boats.",
]


def test_the_tutorials_chain_with_one_line_changed(tmp_path: Path) -> None:
    """Load, split, store; then a chain whose system prompt is written from what is found."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    model = ChatKVCache(model="kvrag/reader", store=tmp_path / "caches", max_tokens=32)  # the changed line
    splitter = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200)
    chunks = splitter.split_documents([Document(text) for text in PEOPLE])
    store = InMemoryVectorStore(LexicalEmbeddings())
    store.add_documents(chunks)

    @dynamic_prompt
    def prompt_with_context(request: ModelRequest) -> str:
        found = store.similarity_search(request.state["messages"][-1].text, k=2)
        return f"Answer from the documents.\n\n{format_docs(found)}"

    agent: Any = create_agent(model, tools=[], middleware=[prompt_with_context])
    question = {"messages": [{"role": "user", "content": "Where does Neiia Kleiski live?"}]}
    answers = [agent.invoke(question)["messages"][-1] for _ in range(2)]
    assert [a.text for a in answers] == [answers[0].text] * 2
    assert "Naihaven" in answers[0].text
    # similarity_search called past a retriever tells nobody what it found: nothing is known, all is read.
    assert answers[1].response_metadata["kvrag"]["documents"] == []


def test_the_same_with_caches_from_the_vector_store(tmp_path: Path) -> None:
    """The same chain over `KVChroma`, where a search is enough for the documents to be known."""
    model = ChatKVCache(model="kvrag/reader", store=tmp_path / "caches", max_tokens=32)
    with KVChroma("docs", LexicalEmbeddings(), str(tmp_path / "chroma"), engine=model) as store:
        store.add_documents([Document(text) for text in PEOPLE])

        @dynamic_prompt
        def prompt_with_context(request: ModelRequest) -> str:
            found = store.similarity_search(request.state["messages"][-1].text, k=2)
            return f"Answer from the documents.\n\n{format_docs(found)}"

        agent: Any = create_agent(model, tools=[], middleware=[prompt_with_context])
        question = {"messages": [{"role": "user", "content": "Where does Neiia Kleiski live?"}]}
        answer = agent.invoke(question)["messages"][-1]
    assert "Naihaven" in answer.text
    uses = answer.response_metadata["kvrag"]["documents"]
    assert [use["is_hit"] for use in uses] == [True, True]
    assert uses[0]["focus"] + uses[1]["focus"] == pytest.approx(1.0, abs=1e-3)


def test_two_models_of_one_process_do_not_share_what_they_know(documents: list[str]) -> None:
    from kvrag.ingested import known_of

    with Engine(tiny()) as one, Engine(tiny(seed=1)) as two:
        known_of(one).add(documents)
        assert documents[0] not in known_of(two)
