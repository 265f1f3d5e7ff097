"""The vector store: caches that live and die with the documents of langchain-chroma's store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index

from kvrag import ConfigError, CorpusLocked, Engine, Model
from kvrag.ingested import known_of
from kvrag.testing.models import tiny_tokenizer
from langchain_kvrag import ChatKVCache, KVCacheLLM, KVChroma, LexicalEmbeddings, attach


@pytest.fixture
def held(engine: Engine, tmp_path: Path) -> Iterator[KVChroma]:
    cosine: Any = {"hnsw": {"space": "cosine"}}
    with KVChroma(
        "docs", LexicalEmbeddings(), str(tmp_path / "chroma"), engine=engine, collection_configuration=cosine
    ) as made:
        yield made


def entries(engine: Engine) -> set[str]:
    assert engine.store is not None
    assert engine.store.check().ok
    return set(engine.store.ids())


def test_adding_builds_and_deleting_removes(held: KVChroma, engine: Engine, documents: list[str]) -> None:
    ids = held.add_texts(documents)
    assert len(entries(engine)) == 4
    assert documents[0] in known_of(engine)
    held.delete(ids[:1])
    assert len(entries(engine)) == 3
    assert documents[0] not in known_of(engine)
    held.delete(where={"nothing": "has this"})
    assert len(entries(engine)) == 3


def test_updating_replaces(held: KVChroma, engine: Engine, documents: list[str]) -> None:
    (one,) = held.add_texts(documents[:1], [{"a": 1}])
    before = entries(engine)
    held.update_document(one, Document(documents[1], metadata={"a": 1}))
    assert len(entries(engine)) == 1
    assert entries(engine) != before
    assert [text in known_of(engine) for text in documents[:2]] == [False, True]
    held.update_documents(["nobody"], [Document(documents[2], metadata={"a": 1})])
    assert len(entries(engine)) == 1
    held.add_texts(documents[3:], ids=[one])  # replaces, too
    assert held.get()["documents"] == documents[3:]
    assert len(entries(engine)) == 1


def test_two_documents_with_one_text_share_an_entry(
    held: KVChroma, engine: Engine, documents: list[str]
) -> None:
    ids = held.add_texts([documents[0]] * 2)
    assert len(entries(engine)) == 1
    held.delete(ids[:1])
    assert len(entries(engine)) == 1
    assert documents[0] in known_of(engine)
    held.delete(ids[1:])
    assert entries(engine) == set()


def test_two_collections_share_entries(held: KVChroma, engine: Engine, documents: list[str]) -> None:
    other = KVChroma("others", LexicalEmbeddings(), client=held._client, engine=engine)
    held.add_texts(documents[:2])
    other.add_texts(documents[1:3])
    held.delete_collection()
    assert len(entries(engine)) == 2
    other.reset_collection()
    assert entries(engine) == set()
    other.add_texts(documents[:1])
    assert len(entries(engine)) == 1


def test_a_batch_that_chroma_refuses_leaves_nothing(
    held: KVChroma, engine: Engine, documents: list[str]
) -> None:
    held.add_texts(documents[:1], ids=["a"])
    with pytest.raises(Exception, match="metadata"):
        held.add_texts(documents[1:3], [{"x": {"nested": 1}}, {"y": {"nested": 1}}], ids=["a", "b"])
    assert len(entries(engine)) == 1
    assert held.get()["documents"] == documents[:1]
    held.delete(["a"])
    assert entries(engine) == set()


def test_more_documents_than_chroma_takes_at_once(held: KVChroma, bare_engine: Engine) -> None:
    most = held._client.get_max_batch_size()
    small = KVChroma("many", LexicalEmbeddings(16), client=held._client, engine=bare_engine)
    small.add_texts([f"text {n}" for n in range(most + 5)])
    assert small._collection.count() == most + 5


def test_what_the_model_cannot_read_at_once_is_kept_without_a_cache(
    held: KVChroma, engine: Engine, documents: list[str]
) -> None:
    held.add_texts(["a" * 5000, documents[0]])
    assert held._collection.count() == 2
    assert len(entries(engine)) == 1
    report = held.reconcile()
    assert (report.records, report.built, len(report.unencodable)) == (2, 0, 1)


def test_retrieved_documents_come_from_caches_in_the_first_answer(
    held: KVChroma, engine: Engine, documents: list[str], cached: Any
) -> None:
    held.add_texts(documents)
    model = ChatKVCache(engine=engine, max_tokens=8)
    found = held.similarity_search("Who built the lighthouse of Varn?", k=2)
    answer = model.invoke("\n\n".join(document.page_content for document in found) + "\n\nWhy?")
    told = answer.response_metadata["kvrag"]["documents"]
    assert [use["is_hit"] for use in told] == [True, True]
    assert cached(answer) >= sum(len(model.get_token_ids(d.page_content)) for d in found)


@pytest.mark.filterwarnings("ignore:legacy embedding function config")  # of the way langchain-chroma opens it
def test_searching_goes_on_as_before(held: KVChroma, documents: list[str]) -> None:
    held.add_texts(documents, [{"n": n} for n in range(4)])
    (best, *_) = held.max_marginal_relevance_search("lighthouse", k=2, fetch_k=4)
    assert best.page_content == documents[0]
    (only,) = held.similarity_search("lighthouse", k=4, filter={"n": 2})
    assert only.page_content == documents[2]
    assert len(held.similarity_search_with_relevance_scores("bread", k=2)) == 2
    retriever = held.as_retriever(search_type="mmr", search_kwargs={"k": 1})
    assert retriever.invoke("ferry")[0].page_content == documents[1]


def test_threads_that_replace_one_document_leave_its_last_text(
    held: KVChroma, engine: Engine, documents: list[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: held.add_texts([text], ids=["a"]), documents * 3))
    (text,) = held.get()["documents"]
    assert len(entries(engine)) == 1
    assert [one in known_of(engine) for one in documents] == [one == text for one in documents]
    assert held.reconcile().built == 0


async def test_async_methods_do_the_same(held: KVChroma, engine: Engine, documents: list[str]) -> None:
    ids = await held.aadd_documents([Document(text) for text in documents])
    assert len(entries(engine)) == 4
    await held.adelete(ids[1:])
    assert len(entries(engine)) == 1
    assert [d.page_content for d in await held.asimilarity_search("ferry", k=1)] == documents[:1]


def test_langchains_indexing_keeps_caches_in_step(
    held: KVChroma, engine: Engine, documents: list[str]
) -> None:
    manager = InMemoryRecordManager("docs")
    manager.create_schema()
    given = [Document(text, metadata={"source": "a"}) for text in documents]

    def run(some: list[Document]) -> dict[str, int]:
        return dict(index(some, manager, held, cleanup="full", source_id_key="source", key_encoder="sha256"))

    assert run(given)["num_added"] == 4
    assert len(entries(engine)) == 4
    assert run(given)["num_skipped"] == 4
    assert run(given[:2])["num_deleted"] == 2
    assert len(entries(engine)) == 2


def test_a_full_store_gets_its_caches_and_only_once(
    engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    old = Chroma("old", LexicalEmbeddings(), str(tmp_path / "old"))
    old.add_texts(documents)
    held = attach(old, engine, progress=False)
    assert len(entries(engine)) == 4
    assert held.reconcile().built == 0
    old.add_texts(["Written past us, but long enough to be found."])
    old.delete([old.get()["ids"][old.get()["documents"].index(documents[0])]])
    report = held.reconcile()
    assert (report.records, report.built, report.removed) == (4, 1, 1)
    assert held.similarity_search("ferry", k=1)[0].page_content == documents[1]


def test_warming_up_goes_on_where_it_was_interrupted(
    engine: Engine, tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrag import companion

    old = Chroma("old", LexicalEmbeddings(), str(tmp_path / "old"))
    old.add_texts([f"{text} {n}" for n in range(10) for text in documents])

    def stop(self: Any, records: Any) -> Any:
        if len(entries(engine)) >= 32:
            raise KeyboardInterrupt
        return hold(self, records)

    hold = companion.Companion._hold
    monkeypatch.setattr(companion.Companion, "_hold", stop)
    with pytest.raises(KeyboardInterrupt):
        attach(old, engine, progress=False)
    assert len(entries(engine)) == 32
    monkeypatch.undo()
    attach(old, engine, progress=True)
    assert len(entries(engine)) == 40


def test_a_collection_that_is_opened_again_is_known(
    engine: Engine, bare_engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    with KVChroma("docs", LexicalEmbeddings(), str(tmp_path / "c"), engine=engine) as held:
        held.add_texts(documents)
    later = Engine(bare_engine.model, tmp_path / "store")
    with later, KVChroma("docs", LexicalEmbeddings(), str(tmp_path / "c"), engine=later):
        assert all(text in known_of(later) for text in documents)
        answer = ChatKVCache(engine=later, max_tokens=4).invoke(documents[3])
    assert answer.response_metadata["kvrag"]["documents"][0]["is_hit"]


_OTHER = """
import sys
from kvrag.database import open_database
database = open_database(sys.argv[1])
database.begin_writing()
print("locked", flush=True)
sys.stdin.read()
"""


def test_only_one_process_writes_to_a_folder(
    held: KVChroma, engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    held.add_texts(documents[:1])
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(tmp_path / "chroma")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(CorpusLocked):
        held.add_texts(documents[1:])
    assert held._collection.count() == 1
    assert len(entries(engine)) == 1
    other.communicate("")
    held.add_texts(documents[1:])
    assert len(entries(engine)) == 4


def test_without_an_engine_or_a_store_it_says_so(bare_engine: Engine, documents: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"needs engine=\.\.\."):
        KVChroma("docs", LexicalEmbeddings())
    held = KVChroma("storeless", LexicalEmbeddings(), engine=bare_engine)
    held.add_texts(documents)
    assert documents[0] in known_of(bare_engine)
    with pytest.raises(ConfigError, match="no store to keep caches in"):
        held.reconcile()
    held.delete_collection()


def test_models_without_a_template_find_the_same_caches(
    bare_engine: Engine, tmp_path: Path, documents: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = Model(bare_engine.model.network, tokenizer, name="bare")
    for number, of_engine in enumerate((True, False)):
        with Engine(bare, tmp_path / f"bare{number}") as engine:
            model = KVCacheLLM(engine=engine, max_tokens=4)
            held = KVChroma(f"bare{number}", LexicalEmbeddings(), engine=engine if of_engine else model)
            held.add_texts(documents)
            told: Any = model.generate([documents[0]]).generations[0][0].generation_info
            assert [use["is_hit"] for use in told["kvrag"]["documents"]] == [True]


def test_from_texts_builds_caches(engine: Engine, documents: list[str], tmp_path: Path) -> None:
    with KVChroma.from_texts(
        documents, LexicalEmbeddings(), persist_directory=str(tmp_path / "c"), engine=engine
    ) as held:
        assert isinstance(held, KVChroma)
        assert len(entries(engine)) == 4
