"""The document store: suites of LangChain, whole documents behind small pieces, caches in step with them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import MultiVectorRetriever, ParentDocumentRetriever
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests
from langchain_text_splitters import RecursiveCharacterTextSplitter

from kvrag import ConfigError, CorpusLocked, Engine, InputError
from kvrag.companion import Companion
from kvrag.ingested import known_of
from kvrag.records import RecordFile
from langchain_kvrag import ChatKVCache, KVChroma, KVDocStore, LexicalEmbeddings

QUESTION = "When was the lighthouse of Varn built?"
FORM = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents.\n\n{context}"), ("human", "{input}")]
)


@pytest.fixture
def held(engine: Engine, tmp_path: Path) -> Iterator[KVDocStore]:
    with KVDocStore(tmp_path / "parents", engine=engine) as made:
        yield made


def entries(engine: Engine) -> set[str]:
    assert engine.store is not None
    assert engine.store.check().ok
    return set(engine.store.ids())


def pairs(documents: list[str]) -> list[tuple[str, Document]]:
    return [(f"doc{n}", Document(text, metadata={"n": n})) for n, text in enumerate(documents)]


class TestDocStore(BaseStoreSyncTests[Document]):
    @pytest.fixture
    def kv_store(self, held: KVDocStore) -> BaseStore[str, Document]:
        return held

    @pytest.fixture
    def three_values(self, documents: list[str]) -> tuple[Document, Document, Document]:
        one, two, three = documents[:3]
        return (
            Document(one, metadata={"source": "a", "pages": [1, 2]}),
            Document(two, id="its own"),
            Document(three),
        )


class TestDocStoreAsync(BaseStoreAsyncTests[Document]):
    @pytest.fixture
    async def kv_store(self, held: KVDocStore) -> BaseStore[str, Document]:
        return held

    @pytest.fixture
    def three_values(self, documents: list[str]) -> tuple[Document, Document, Document]:
        one, two, three = documents[:3]
        return (
            Document(one, metadata={"deep": {"x": [None, 1.5]}}),
            Document(two, id="its own"),
            Document(three),
        )


# ---- in a chain


@pytest.fixture
def parents(held: KVDocStore, engine: Engine, tmp_path: Path) -> Iterator[ParentDocumentRetriever]:
    splitter = RecursiveCharacterTextSplitter(chunk_size=30, chunk_overlap=0)
    with KVChroma("pieces", LexicalEmbeddings(), str(tmp_path / "chroma"), engine=engine) as pieces:
        yield ParentDocumentRetriever(
            vectorstore=pieces, docstore=held, child_splitter=splitter, search_kwargs={"k": 2}
        )


def test_parents_come_from_caches_from_the_first_answer_on(
    parents: ParentDocumentRetriever, engine: Engine, bare_engine: Engine, documents: list[str], cached: Any
) -> None:
    parents.add_documents([Document(text) for text in documents])
    answers = []
    for of in (bare_engine, engine, engine):
        model = ChatKVCache(engine=of, max_tokens=24)
        chain: Any = {"context": parents | _joined, "input": lambda question: question} | FORM | model
        answers.append(chain.invoke(QUESTION))
    without, first, second = answers
    found = parents.invoke(QUESTION)
    assert {document.page_content for document in found} <= set(documents)
    assert documents[0] in {document.page_content for document in found}
    assert first.content == second.content == without.content
    used = [answer.response_metadata["kvrag"]["documents"] for answer in answers]
    hits = [[use["is_hit"] for use in of] for of in used]
    assert hits == [[False] * len(found), [True] * len(found), [True] * len(found)]
    tokens = sum(len(engine.model.text.tokenize(document.page_content)) for document in found)
    assert cached(without) < tokens
    assert cached(first) >= tokens
    assert cached(second) >= tokens


def _joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


async def test_the_async_retrieval_chain_answers_the_same(
    parents: ParentDocumentRetriever, engine: Engine, bare_engine: Engine, documents: list[str]
) -> None:
    await parents.aadd_documents([Document(text, metadata={"source": "a"}) for text in documents])
    answers = []
    for of in (bare_engine, engine):
        model = ChatKVCache(engine=of, max_tokens=24)
        chain = create_retrieval_chain(parents, create_stuff_documents_chain(model, FORM))
        answers.append(await chain.ainvoke({"input": QUESTION}))
    assert answers[0]["answer"] == answers[1]["answer"]
    assert answers[1]["context"][0] == Document(documents[0], metadata={"source": "a"})


def test_summaries_are_searched_and_documents_read(
    held: KVDocStore, engine: Engine, documents: list[str]
) -> None:
    held.mset(pairs(documents))
    summaries = InMemoryVectorStore(LexicalEmbeddings())
    summaries.add_documents(
        [Document(text.split(" ")[1], metadata={"doc_id": f"doc{n}"}) for n, text in enumerate(documents)]
    )
    finding = MultiVectorRetriever(vectorstore=summaries, docstore=held, search_kwargs={"k": 1})
    (found,) = finding.invoke("lighthouse")
    answer = ChatKVCache(engine=engine, max_tokens=4).invoke(f"{found.page_content}\n\nWhy?")
    assert found == Document(documents[0], metadata={"n": 0})
    assert [use["is_hit"] for use in answer.response_metadata["kvrag"]["documents"]] == [True]


# ---- caches in step


def test_setting_builds_and_deleting_removes(held: KVDocStore, engine: Engine, documents: list[str]) -> None:
    held.mset(pairs(documents))
    assert len(entries(engine)) == 4
    assert documents[0] in known_of(engine)
    held.mdelete(["doc0", "doc0", "nobody"])
    assert len(entries(engine)) == 3
    assert documents[0] not in known_of(engine)
    held.mdelete(list(held.yield_keys()))
    assert entries(engine) == set()
    assert held.reconcile().records == 0


def test_a_new_text_replaces_the_cache_and_new_metadata_do_not(
    held: KVDocStore, engine: Engine, documents: list[str]
) -> None:
    held.mset([("a", Document(documents[0]))])
    before = entries(engine)
    held.mset([("a", Document(documents[0], metadata={"new": True}))])
    assert entries(engine) == before
    assert held.mget(["a"]) == [Document(documents[0], metadata={"new": True})]
    held.mset([("a", Document(documents[1])), ("a", Document(documents[2]))])  # the last counts
    assert len(entries(engine)) == 1
    assert entries(engine) != before
    assert [text in known_of(engine) for text in documents[:3]] == [False, False, True]


def test_one_text_under_two_keys_and_in_a_vector_store_has_one_cache(
    held: KVDocStore, engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    with KVChroma("pieces", LexicalEmbeddings(), str(tmp_path / "chroma"), engine=engine) as pieces:
        pieces.add_texts(documents[:1], ids=["piece"])
        held.mset([("a", Document(documents[0])), ("b", Document(documents[0]))])
        for gone in (lambda: held.mdelete(["a"]), lambda: pieces.delete(["piece"])):
            gone()
            assert len(entries(engine)) == 1
    held.mdelete(["b"])
    assert entries(engine) == set()


def test_what_the_model_cannot_read_at_once_is_kept_without_a_cache(
    held: KVDocStore, engine: Engine, documents: list[str]
) -> None:
    given = [("long", Document("a" * 5000)), ("empty", Document("")), ("short", Document(documents[0]))]
    held.mset(given)
    assert held.mget(["long", "empty", "short"]) == [document for _, document in given]
    assert len(entries(engine)) == 1
    report = held.reconcile()
    assert (report.records, report.built, sorted(report.unencodable)) == (3, 0, ["empty", "long"])
    held.mset([("short", Document("b" * 5000))])
    assert entries(engine) == set()


def test_a_store_that_is_opened_again_has_everything(
    engine: Engine, bare_engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    with KVDocStore(tmp_path / "parents", engine=engine) as held:
        held.mset(pairs(documents))
    built = entries(engine)
    later = Engine(bare_engine.model, tmp_path / "store")
    with later, KVDocStore(tmp_path / "parents", engine=later) as again:
        assert all(text in known_of(later) for text in documents)
        assert again.mget(["doc3", "nobody", "doc0"]) == [
            Document(documents[3], metadata={"n": 3}),
            None,
            Document(documents[0], metadata={"n": 0}),
        ]
        answer = ChatKVCache(engine=later, max_tokens=4).invoke(documents[3])
        assert answer.response_metadata["kvrag"]["documents"][0]["is_hit"]
        report = again.reconcile()
        assert (report.records, report.built, report.removed) == (4, 0, 0)
        assert entries(later) == built
        again.mdelete(["doc0"])
        assert len(entries(later)) == 3
        assert documents[0] not in known_of(later)


def test_what_is_not_remembered_at_once_is_when_it_is_asked_for(
    engine: Engine, bare_engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    with KVDocStore(tmp_path / "parents", engine=engine) as held:
        held.mset(pairs(documents))
    with (
        Engine(bare_engine.model, tmp_path / "store") as later,
        KVDocStore(tmp_path / "parents", engine=later, remember=3) as again,
    ):
        assert documents[1] not in known_of(later)
        again.mget(["doc1"])
        assert documents[1] in known_of(later)


def test_another_stores_caches_are_built_with_a_bar(
    held: KVDocStore, bare_engine: Engine, tmp_path: Path, documents: list[str], capsys: Any
) -> None:
    held.mset(pairs(documents))
    with (
        Engine(bare_engine.model, tmp_path / "other") as later,
        KVDocStore(tmp_path / "parents", engine=later) as again,
    ):
        assert again.reconcile(progress=True).built == 4
        assert len(entries(later)) == 4
    assert "4/4" in capsys.readouterr().err


# ---- what is refused changes nothing


def test_other_values_are_refused_whole(held: KVDocStore, engine: Engine, documents: list[str]) -> None:
    class Longer(Document):
        more: int = 0

    class Same(Document):
        """A class of its own, with nothing more to it."""

    good = ("good", Document(documents[0]))
    refused: list[tuple[Any, Any, str]] = [
        ("bad", b"bytes", r"'bad': KVDocStore keeps Documents, .*; got bytes"),
        ("bad", Longer("text", more=1), r"a Longer has fields that a Document has not \(more\)"),
        ("bad", Document("text", metadata={"when": {1, 2}}), r"'bad': metadata is not kept as it is by JSON"),
        ("\ud800", Document("text"), "half a character"),
        (5, Document("text"), "5 is no name for a document: names are text"),
    ]
    for key, value, message in refused:
        with pytest.raises(InputError, match=message):
            held.mset([good, (key, value)])
    assert list(held.yield_keys()) == []
    assert entries(engine) == set()
    held.mset([("same", Same("text"))])
    assert held.mget(["same"]) == [Document("text")]


def test_an_engine_without_a_store_keeps_documents_only(
    bare_engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    with KVDocStore(tmp_path / "parents", engine=ChatKVCache(engine=bare_engine)) as held:
        held.mset(pairs(documents))
        assert documents[0] in known_of(bare_engine)
        held.mdelete(["doc0"])
        assert list(held.yield_keys()) == ["doc1", "doc2", "doc3"]
        with pytest.raises(ConfigError, match="no store to keep caches in"):
            held.reconcile()


@pytest.mark.parametrize("deletes", [False, True], ids=["set", "delete"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_change_that_fails_leaves_documents_and_caches_as_they_were(
    *,
    deletes: bool,
    late: bool,
    held: KVDocStore,
    engine: Engine,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written, or when all is and only the references' entries are to be removed."""
    held.mset([("a", Document(documents[0]))])
    before = entries(engine)
    if late:
        _interrupt_once(Companion, "collect", monkeypatch)
    else:
        _interrupt_once(RecordFile, "remove" if deletes else "put", monkeypatch)
    change = partial(held.mset, [("a", Document(documents[1])), ("b", Document(documents[2]))])
    with pytest.raises(KeyboardInterrupt):
        (partial(held.mdelete, ["a"]) if deletes else change)()
    assert held.mget(["a", "b"]) == [Document(documents[0]), None]
    assert entries(engine) == before
    held.mset([("b", Document(documents[0]))])
    held.mdelete(["b"])
    assert entries(engine) == before  # "a" refers to it
    held.mdelete(["a"])
    assert entries(engine) == set()


def _interrupt_once(of: type, name: str, patch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        patch.setattr(of, name, whole)
        raise KeyboardInterrupt

    whole = getattr(of, name)
    patch.setattr(of, name, interrupted)


# ---- at once


def test_threads_that_replace_one_document_leave_its_last_text(
    held: KVDocStore, engine: Engine, documents: list[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: held.mset([("a", Document(text))]), documents * 3))
    (left,) = held.mget(["a"])
    assert left is not None
    assert len(entries(engine)) == 1
    assert [one in known_of(engine) for one in documents] == [one == left.page_content for one in documents]
    report = held.reconcile()
    assert (report.built, report.removed) == (0, 0)


def test_threads_that_set_and_delete_keep_their_own(
    held: KVDocStore, engine: Engine, documents: list[str]
) -> None:
    def work(number: int) -> None:
        for text in documents:
            held.mset([(f"{number}-kept", Document(text)), (f"{number}-gone", Document(f"{text} {number}"))])
            held.mdelete([f"{number}-gone"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert list(held.yield_keys()) == ["0-kept", "1-kept"]
    assert len(entries(engine)) == 1
    assert held.reconcile().built == 0


async def test_reading_documents_does_not_hold_up_the_loop(
    held: KVDocStore, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file waits for the loop: with the loop held up, neither would go on."""
    loop, goes_on = asyncio.get_running_loop(), threading.Event()
    put = RecordFile.put

    def waiting(self: RecordFile, rows: Any) -> None:
        loop.call_soon_threadsafe(goes_on.set)
        assert goes_on.wait(60)
        put(self, rows)

    monkeypatch.setattr(RecordFile, "put", waiting)
    await held.amset(pairs(documents))
    assert await held.amget(["doc1"]) == [Document(documents[1], metadata={"n": 1})]
    assert [key async for key in held.ayield_keys(prefix="doc")] == ["doc0", "doc1", "doc2", "doc3"]
    await held.amdelete(["doc0"])
    assert [key async for key in held.ayield_keys()] == ["doc1", "doc2", "doc3"]


def test_keys_can_be_deleted_while_they_are_listed(held: KVDocStore, documents: list[str]) -> None:
    held.mset([(f"{n % 2}/{n}", Document(documents[n % 4])) for n in range(8)])
    for key in held.yield_keys(prefix="1/"):
        held.mdelete([key])
    assert list(held.yield_keys()) == ["0/0", "0/2", "0/4", "0/6"]


_OTHER = """
import sys
from langchain_core.documents import Document
from kvrag import Engine
from kvrag.testing.models import tiny
from langchain_kvrag import KVDocStore
folder, number, *texts = sys.argv[1:]
with Engine(tiny(), folder + "/store") as engine, KVDocStore(folder + "/parents", engine=engine) as held:
    for text in texts:
        held.mset([("both", Document(text + " " + number)), (number, Document(text))])
"""


def test_processes_share_a_folder(
    held: KVDocStore, engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    others = [
        subprocess.Popen([sys.executable, "-c", _OTHER, str(tmp_path), str(number), *documents])
        for number in range(2)
    ]
    assert [other.wait() for other in others] == [0, 0]
    assert sorted(held.yield_keys()) == ["0", "1", "both"]
    assert held.mget(["0", "1"]) == [Document(documents[3])] * 2
    assert len(entries(engine)) == 2  # of "both", and of the text that the two have
    report = held.reconcile()
    assert (report.built, report.removed) == (0, 0)


def test_a_process_that_writes_for_long_is_said(
    held: KVDocStore, engine: Engine, tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrag.store.index_file.BUSY_SECONDS", 0.05)
    with KVDocStore(tmp_path / "parents", engine=engine) as impatient:
        other = RecordFile(tmp_path / "parents")
        with other.writing():
            with pytest.raises(CorpusLocked, match="another process is writing"):
                impatient.mset(pairs(documents))
            assert impatient.mget(["doc0"]) == [None]  # readers go on
        other.close()
        assert entries(engine) == set()
        impatient.mset(pairs(documents))
    assert len(entries(engine)) == 4
