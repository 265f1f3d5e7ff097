"""Query engines, chat engines, memory and agents of LlamaIndex, with only the model exchanged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document, PromptTemplate, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool, QueryEngineTool

import llama_index.postprocessor.kvrag
from kvrag import ConfigError, Engine, InputError, Policy
from kvrag.focus import QueryDriven
from kvrag.known import KnownTexts
from kvrag.reader.collection import documents, questions
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.llms.kvrag._hints import FIELD
from llama_index.postprocessor.kvrag import KVCachePostprocessor, answer_scores

EXACT = Policy(repair=QueryDriven(1.0))  # everything is read again: full attention
MODES = {
    # mode: calls of the model, and whether the texts stand in its prompt as they are
    "compact": (1, True),
    "refine": (3, True),
    "tree_summarize": (1, True),
    "simple_summarize": (1, False),  # LlamaIndex pastes a Python list
    "accumulate": (3, True),
    "compact_accumulate": (1, True),
}
QUESTION = questions(num=1, num_documents=20)[0]
Make = Callable[..., KVCacheLLM]


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    from llama_index.embeddings.kvrag import LexicalEmbedding

    made = [Document(text=d.text, metadata={"file_name": f"{d.title}.txt"}) for d in documents(num=20)]
    return VectorStoreIndex.from_documents(made, embed_model=LexicalEmbedding())


def shares(heard: Any, response: Any, llm: KVCacheLLM) -> tuple[int, int]:
    """Tokens of retrieved nodes, and how many of them came from caches in the last answers."""
    pasted = [found.node.get_content(MetadataMode.LLM) for found in response.source_nodes]
    uses = [use for answer in heard.answers() for use in answer.raw["kvrag"]["documents"]]
    return sum(len(llm.tokenize(t)) for t in pasted), sum(u["num_tokens"] for u in uses if u["is_hit"])


@pytest.mark.parametrize("mode", MODES)
def test_response_modes(mode: str, index: Any, make: Make, heard: Any) -> None:
    """Answers are those of reading everything, and what stands in the prompt verbatim is not read twice."""
    on, off = make(policy=EXACT), make(caches=False)
    num_calls, is_verbatim = MODES[mode]
    asked = {"similarity_top_k": 3, "response_mode": mode}
    for llm in (on, on, off):
        heard.events.clear()
        response = index.as_query_engine(llm=llm, **asked).query(QUESTION.question)
        assert len(heard.answers()) == num_calls
        if llm is on:
            whole, cached = shares(heard, response, llm)
            answer = str(response)
        else:
            assert str(response) == answer
    assert cached >= 0.95 * whole if is_verbatim else cached == 0


def test_the_canonical_tier_finds_what_was_escaped(
    index: Any, reader: Any, tmp_path: Any, heard: Any
) -> None:
    """LlamaIndex pastes a Python list in `simple_summarize`; asked for, its texts are found all the same."""
    with Engine(reader, tmp_path / "canonical", known=KnownTexts(["canonical"])) as engine:
        llm = KVCacheLLM(engine=engine, max_tokens=12)
        asked = index.as_query_engine(llm=llm, similarity_top_k=3, response_mode="simple_summarize")
        for _ in range(2):
            heard.events.clear()
            response = asked.query(QUESTION.question)
        whole, cached = shares(heard, response, llm)
    assert cached == whole


def test_caches_answer_as_the_same_rows_read_now(index: Any, make: Make, reader: Any) -> None:
    """Under every policy a loaded row is the row that reading gives."""
    engine = index.as_query_engine(llm=make(), similarity_top_k=3)
    first, second = engine.query(QUESTION.question), engine.query(QUESTION.question)
    with Engine(reader) as bare:
        bare_llm = KVCacheLLM(engine=bare, max_tokens=12)
        third = index.as_query_engine(llm=bare_llm, similarity_top_k=3).query(QUESTION.question)
    assert str(first) == str(second) == str(third)


def test_texts_that_are_cut_again(make: Make, heard: Any) -> None:
    """A window too small for all: pieces of texts are read afresh, whole ones come from caches."""
    texts = [d.text.replace("\n", " ") for d in documents(num=4)]
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
    on, off = make(policy=EXACT), make(caches=False)
    answers = []
    for llm in (on, on, off):
        heard.events.clear()
        post = KVCachePostprocessor(llm)
        helper = PromptHelper(context_window=1150, num_output=12, tokenizer=llm.tokenize)
        synthesizer = get_response_synthesizer(llm=llm, response_mode="compact", prompt_helper=helper)
        response = synthesizer.synthesize(QUESTION.question, post.postprocess_nodes(nodes))
        answers.append((str(response), len(heard.answers())))
        if llm is on:
            _, cached = shares(heard, response, llm)
    assert answers[0] == answers[2] == answers[1]
    assert answers[0][1] > 1, "the texts did not fit into one prompt"
    assert cached > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_asynchronous_and_streaming(index: Any, make: Make, heard: Any, streaming: bool) -> None:
    llm = make()
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, streaming=streaming)
    expected = str(index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION.question))
    heard.events.clear()

    async def main() -> str:
        response = await engine.aquery(QUESTION.question)
        if not streaming:
            return str(response)
        return "".join([piece async for piece in response.async_response_gen()])

    assert asyncio.run(main()) == expected
    uses = heard.answers()[-1].raw["kvrag"]["documents"]
    assert [use["is_hit"] for use in uses] == [True] * 3
    if streaming:
        assert "".join(engine.query(QUESTION.question).response_gen) == expected


# ---- nodes


def test_public_names() -> None:
    assert llama_index.postprocessor.kvrag.__all__ == ["KVCachePostprocessor", "answer_scores"]


@pytest.mark.parametrize("streaming", [False, True])
def test_nodes_get_the_answers_attention(index: Any, make: Make, streaming: bool) -> None:
    llm = make()
    asked = {"similarity_top_k": 3, "node_postprocessors": [KVCachePostprocessor(llm)], "llm": llm}
    engine = index.as_query_engine(streaming=streaming, **asked)
    response = engine.query(QUESTION.question)
    if streaming:
        assert all("focus" not in scores for scores in answer_scores(response).values())
        assert "".join(response.response_gen)
    scores = answer_scores(response)
    assert list(scores) == [found.node.node_id for found in response.source_nodes]
    best = max(response.source_nodes, key=lambda found: scores[found.node.node_id]["focus"])
    assert best.node.metadata["file_name"] == f"{QUESTION.titles[0]}.txt"
    assert FIELD not in best.node.get_content(MetadataMode.LLM)
    assert FIELD not in best.node.get_content(MetadataMode.EMBED)
    stored = index.docstore.get_node(best.node.node_id)
    assert FIELD not in stored.metadata, "copies are marked, not what the index holds"


def test_asynchronous_answers_mark_their_nodes(index: Any, make: Make) -> None:
    llm = make()
    engine = index.as_query_engine(llm=llm, node_postprocessors=[KVCachePostprocessor(llm)])
    names = [d.title for d in documents(num=20)[:4]]

    async def main() -> list[Any]:
        return await asyncio.gather(*(engine.aquery(f"What is {name}?") for name in names))

    for name, response in zip(names, asyncio.run(main()), strict=True):
        assert any(name in found.node.get_content() for found in response.source_nodes)
        assert all("focus" in scores for scores in answer_scores(response).values())


def test_requests_in_threads_do_not_mix(index: Any, make: Make, heard: Any) -> None:
    llm = make()
    engine = index.as_query_engine(
        llm=llm, similarity_top_k=1, node_postprocessors=[KVCachePostprocessor(llm)]
    )
    names = [d.title for d in documents(num=20)[:3]]
    alone = {name: str(engine.query(f"What is {name}?")) for name in names}
    found: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: engine.query(f"What is {n}?")})) for n in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert str(found[name]) == alone[name]
        ((_, scores),) = answer_scores(found[name]).items()
        assert scores["is_hit"]


def scored(*texts: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=t, id_=t[:1]), score=1 - i / 10) for i, t in enumerate(texts)]


def ids(nodes: list[NodeWithScore]) -> str:
    return "".join(found.node.node_id for found in nodes)


def test_what_fits_and_in_which_order(make: Make) -> None:
    llm = make()
    nodes = scored("a short text", "b " * 40, "c short text", "", "d " * 5000)
    assert ids(KVCachePostprocessor(llm).postprocess_nodes(nodes)) == "abc"
    assert ids(KVCachePostprocessor(llm, max_tokens=20).postprocess_nodes(nodes)) == "ac"
    assert ids(KVCachePostprocessor(llm, order="best_last").postprocess_nodes(nodes)) == "cba"
    mixed = nodes[2:3] + nodes[:1]
    assert ids(KVCachePostprocessor(llm, order="best_last").postprocess_nodes(mixed)) == "ca"
    assert ids(KVCachePostprocessor(llm).postprocess_nodes(mixed)) == "ca"
    parts = [
        NodeWithScore(node=TextNode(text=f"text {i}", id_=str(i), start_char_idx=100 - i * 10))
        for i in range(3)
    ]
    for part in parts[::2]:
        part.node.relationships = {"1": TextNode(text="", id_="doc").as_related_node_info()}
    assert ids(KVCachePostprocessor(llm, order="source").postprocess_nodes(parts)) == "201"


def test_settings_of_the_post_processor(make: Make) -> None:
    with pytest.raises(ConfigError, match="expected keep, best_last or source"):
        KVCachePostprocessor(make(), order="random")
    with pytest.raises(ConfigError, match="expected the KVCacheLLM"):
        KVCachePostprocessor("llm")  # type: ignore[arg-type]


# ---- chat engines


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
@pytest.mark.parametrize("way", ["chat", "stream_chat", "achat", "astream_chat"])
def test_chat_engines(mode: str, way: str, index: Any, make: Make, heard: Any) -> None:
    llm = make()
    memory = ChatMemoryBuffer.from_defaults(token_limit=1500, tokenizer_fn=llm.tokenize)
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, memory=memory, similarity_top_k=2)

    async def later() -> list[str]:
        said = []
        for question in ("Hello", QUESTION.question):
            response = await getattr(engine, way)(question)
            if "stream" in way:
                said.append("".join([piece async for piece in response.async_response_gen()]))
            else:
                said.append(str(response))
        return said

    def now() -> list[str]:
        said = []
        for question in ("Hello", QUESTION.question):
            response = getattr(engine, way)(question)
            said.append("".join(response.response_gen) if "stream" in way else str(response))
        return said

    said = asyncio.run(later()) if way.startswith("a") else now()
    assert all(said)
    answer = heard.answers()[-1]
    assert len(answer.raw["kvrag"]["documents"]) == 2, "the conversation's prompt has them, too"
    history = memory.get()
    assert [m.role for m in history] == ["user", "assistant"] * 2
    assert [m.content.strip() for m in history[1::2]] == [text.strip() for text in said]


# ---- forms and tools


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


def test_structured_prediction(make: Make) -> None:
    llm = make(max_tokens=80)
    prompt = PromptTemplate("Who is {who}?")
    found = llm.structured_predict(Person, prompt, who="Neiia Kleiski")
    assert isinstance(found, Person)
    assert asyncio.run(llm.astructured_predict(Person, prompt, who="Neiia Kleiski")) == found
    assert list(llm.stream_structured_predict(Person, prompt, who="Neiia Kleiski"))[-1] == found
    assert llm.as_structured_llm(Person).complete("Who is Neiia Kleiski?").raw.name


def test_answers_of_a_schema(make: Make) -> None:
    response = make(max_tokens=80).complete("Who?", json_schema=Person.model_json_schema())
    assert Person.model_validate_json(response.text)


def weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city: its name.
    """
    return f"Rain in {city}"


def test_tools_are_called(make: Make) -> None:
    llm = make(max_tokens=60, max_string=12)
    tool = FunctionTool.from_defaults(weather)
    response = llm.chat_with_tools([tool], user_msg="How is the weather in Varn?", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "weather"
    assert set(call.tool_kwargs) == {"city"}
    assert llm.predict_and_call([tool], "How is it?", tool_required=True).response.startswith("Rain in")
    pieces = list(llm.stream_chat_with_tools([tool], user_msg="How is it?", tool_required=True))
    assert [llm.get_tool_calls_from_response(p, error_on_no_tool_call=False) for p in pieces[:-1]] == [[]] * (
        len(pieces) - 1
    )
    assert llm.get_tool_calls_from_response(pieces[-1])
    assert not any("{" in (p.delta or "") for p in pieces), "calls are no text"
    free = llm.chat_with_tools([tool], user_msg="Hello")
    assert llm.get_tool_calls_from_response(free, error_on_no_tool_call=False) == []
    with pytest.raises(InputError, match="called no tool"):
        llm.get_tool_calls_from_response(free)
    with pytest.raises(ConfigError, match="tool_choice"):
        llm.chat_with_tools([tool], user_msg="Hello", tool_choice="no such tool")


# The workflow library looks at all names of an agent, those that pydantic deprecates included.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_an_agent_answers_from_caches(index: Any, make: Make, heard: Any, streaming: bool) -> None:
    """It is made to look something up; what the tool returns stands in the second prompt."""
    llm = make(max_tokens=200, max_string=24)
    looked_up: list[str] = []

    def search(question: str) -> str:
        """Search the collection."""
        looked_up.append(question)
        nodes = index.as_retriever(similarity_top_k=1).retrieve(QUESTION.question)
        return nodes[0].node.get_content(MetadataMode.LLM)

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(search)],
        llm=llm,
        initial_tool_choice="search",
        streaming=streaming,
        system_prompt="Answer from the documents.",
    )

    async def main() -> Any:
        return await agent.run(user_msg=QUESTION.question)

    response = asyncio.run(main())
    assert looked_up
    assert str(response)
    last = heard.answers()[-1]
    assert len(last.raw["kvrag"]["documents"]) == 1


def test_an_engine_is_a_tool(index: Any, make: Make) -> None:
    llm = make(max_tokens=80, max_string=24)
    tool = QueryEngineTool.from_defaults(index.as_query_engine(llm=llm, similarity_top_k=1), name="look")
    assert llm.predict_and_call([tool], QUESTION.question, tool_required=True).response


def test_log_probabilities(make: Make) -> None:
    response = make(max_tokens=3, logprobs=2).chat([ChatMessage(role="user", content="Hello")])
    assert [len(row) for row in response.logprobs] == [3] * 3
    assert all(row[0].logprob <= row[1].logprob <= 0 for row in response.logprobs)
    assert make().chat([ChatMessage(role="user", content="Hello")]).logprobs is None
