"""Caches are built as nodes are ingested, and go with them: pipelines, document stores, Chroma."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings as ChromaSettings
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.vector_stores.chroma import ChromaVectorStore

import llama_index.ingestion.kvrag
import llama_index.vector_stores.kvrag
from kvrag import ConfigError, Engine, MemoryStore, Model
from kvrag.testing.models import tiny_model, tiny_tokenizer
from llama_index.embeddings.kvrag import LexicalEmbedding
from llama_index.ingestion.kvrag import KVCacheTransform
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.vector_stores.kvrag import KVChromaVectorStore, kv_storage_context

TEXTS = [
    "Neiia Kleiski. She lives in Naihaven. Her hobby is judo.",
    "Peor Tools. The company sells boats. It was founded in 1931.",
    "The lighthouse of Varn was built in 1871 and painted red.",
]
Make = Callable[..., KVCacheLLM]


def documents(*texts: str) -> list[Document]:
    return [
        Document(text=text, doc_id=f"doc{i}", metadata={"file_name": f"{i}.txt", "empty": None})
        for i, text in enumerate(texts)
    ]


def entries(engine: Engine) -> int:
    assert engine.store is not None
    return engine.store.stats().entries


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Any]:
    client = chromadb.PersistentClient(str(tmp_path / "chroma"), ChromaSettings(anonymized_telemetry=False))
    yield client.create_collection(f"c{uuid.uuid4().hex}", embedding_function=None)
    client.clear_system_cache()


@pytest.fixture
def store(collection: Any, llm: KVCacheLLM) -> KVChromaVectorStore:
    return KVChromaVectorStore(chroma_collection=collection, llm=llm)


def pipeline(transform: KVCacheTransform, **named: Any) -> IngestionPipeline:
    steps = [SentenceSplitter(chunk_size=128, chunk_overlap=0), transform, LexicalEmbedding()]
    return IngestionPipeline(transformations=steps, **named)


def node(text: str, node_id: str = "n", document: str = "d") -> TextNode:
    made = TextNode(text=text, id_=node_id, embedding=LexicalEmbedding().get_text_embedding(text))
    made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def test_public_names() -> None:
    assert llama_index.ingestion.kvrag.__all__ == ["KVCacheTransform"]
    assert llama_index.vector_stores.kvrag.__all__ == ["KVChromaVectorStore", "kv_storage_context"]


# ---- pipelines


def test_what_was_ingested_is_answered_from_caches(
    llm: KVCacheLLM, engine: Engine, store: Any, heard: Any
) -> None:
    pipeline(KVCacheTransform(llm=llm), vector_store=store).run(documents=documents(*TEXTS))
    assert entries(engine) == len(TEXTS)
    index = VectorStoreIndex.from_vector_store(store)
    response = index.as_query_engine(llm=llm, similarity_top_k=3).query("Where does Neiia Kleiski live?")
    uses = heard.answers()[-1].raw["kvrag"]["documents"]
    assert [use["is_hit"] for use in uses] == [True] * 3, "headers of metadata, None in them, are part of it"
    assert len(response.source_nodes) == 3


def test_a_model_without_template_finds_its_caches(tmp_path: Path, heard: Any) -> None:
    """What it puts in front of every text (BOS) stands in front of documents, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with Engine(Model(tiny_model("llama"), tokenizer), tmp_path / "store") as engine:
        llm = KVCacheLLM(engine=engine, max_tokens=2)
        nodes = pipeline(KVCacheTransform(llm=llm)).run(documents=documents(*TEXTS))
        VectorStoreIndex(nodes).as_query_engine(llm=llm, similarity_top_k=3).query("Who lives there?")
    uses = heard.answers()[-1].raw["kvrag"]["documents"]
    assert [use["is_hit"] for use in uses] == [True] * 3


@pytest.mark.parametrize("runs", ["run", "arun"])
def test_the_pipelines_own_cache(llm: KVCacheLLM, engine: Engine, runs: str) -> None:
    """It skips the step; what was lost meanwhile is built by `reconcile`, and other settings build anew."""

    def run(made: IngestionPipeline) -> Any:
        done = getattr(made, runs)(documents=documents(*TEXTS))
        return asyncio.run(done) if runs == "arun" else done

    transform = KVCacheTransform(llm=llm)
    made = pipeline(transform)
    nodes = run(made)
    for key in list(engine.store.ids()):
        engine.store.delete(key)
    assert run(made) == nodes
    assert entries(engine) == 0, "skipped"
    report = transform.reconcile(nodes)
    assert (report.built, report.removed, entries(engine)) == (3, 0, 3)
    assert transform.reconcile(nodes).built == 0
    made.transformations[1] = KVCacheTransform(llm=llm, prefix="Other words.")
    run(made)
    assert entries(engine) == 3, "another prefix: other entries in place of the former ones"
    assert transform.reconcile(nodes).built == 3


def test_the_model_is_among_the_settings(llm: KVCacheLLM) -> None:
    told = KVCacheTransform(llm=llm).to_dict()
    assert told["fingerprint"] != KVCacheTransform(llm=llm, prefix="Other words.").to_dict()["fingerprint"]
    assert told == KVCacheTransform(llm=llm).to_dict()


@pytest.mark.parametrize("ours", [True, False], ids=["our vector store", "plain Chroma"])
def test_caches_follow_the_document_store(
    llm: KVCacheLLM, engine: Engine, collection: Any, ours: bool
) -> None:
    vectors = (
        KVChromaVectorStore(chroma_collection=collection, llm=llm)
        if ours
        else ChromaVectorStore(chroma_collection=collection)
    )
    transform = KVCacheTransform(llm=llm)
    docstore = SimpleDocumentStore()
    made = pipeline(
        transform,
        vector_store=vectors,
        docstore=docstore,
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    made.run(documents=documents(*TEXTS))
    before = set(engine.store.ids())
    made.run(documents=documents(*TEXTS))
    assert set(engine.store.ids()) == before, "nothing has changed"
    made.run(documents=documents(TEXTS[0], "A ferry crosses the Mirrow twice a day.", TEXTS[2]))
    after = set(engine.store.ids())
    assert len(after) == 3
    assert len(after & before) == 2, "the changed document's former entry is gone"
    made.run(documents=documents(*TEXTS[:1]))
    gone = transform.follow(docstore)
    assert gone == ([] if ours else ["doc1", "doc2"])
    assert entries(engine) == 1


@pytest.mark.slow
def test_workers_build_caches(tmp_path: Path) -> None:
    """Each loads the model by its settings and writes into the same folder."""
    llm = KVCacheLLM(store=str(tmp_path / "store"), max_tokens=4)
    nodes = pipeline(KVCacheTransform(llm=llm)).run(documents=documents(*TEXTS), num_workers=2)
    assert len(nodes) == 3
    assert entries(llm.running) == 3
    assert KVCacheTransform(llm=llm).reconcile(nodes).built == 0


def test_it_travels_as_its_settings(tmp_path: Path, llm: KVCacheLLM) -> None:
    transform = KVCacheTransform(store=str(tmp_path), owner="mine")
    assert transform.caches.documents() == set()
    again = pickle.loads(pickle.dumps(transform))
    assert again.owner == "mine"
    assert again._caches is None
    assert again.to_dict() == transform.to_dict()
    with pytest.raises(ConfigError, match="name model and store"):
        pickle.dumps(KVCacheTransform(llm=llm))


def test_the_event_loop_is_not_blocked(llm: KVCacheLLM, engine: Engine) -> None:
    async def main() -> int:
        turns = 0
        task = asyncio.create_task(KVCacheTransform(llm=llm).acall([node(text * 3, text) for text in TEXTS]))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(main()) > 3
    assert entries(engine) == 3


def test_nodes_that_no_cache_can_hold_are_handed_on(llm: KVCacheLLM, engine: Engine) -> None:
    nodes = [node("word " * 4000, "a"), node("", "b"), node(TEXTS[0], "c")]
    assert KVCacheTransform(llm=llm)(nodes) == nodes
    assert entries(engine) == 1


def test_settings_that_cannot_work(reader: Any, llm: KVCacheLLM, collection: Any) -> None:
    with pytest.raises(ConfigError, match="no store"):
        KVCacheTransform()
    with pytest.raises(ConfigError, match="expected a KVCacheLLM"):
        KVCacheTransform(llm="llm")  # type: ignore[arg-type]
    with Engine(reader) as bare:
        kept_nowhere = KVCacheLLM(engine=bare)
        with pytest.raises(ConfigError, match="no store"):
            KVCacheTransform(llm=kept_nowhere)
        with pytest.raises(ConfigError, match="no store"):
            kv_storage_context(collection, kept_nowhere)
    with pytest.raises(ConfigError, match="expected the KVCacheLLM"):
        KVChromaVectorStore(chroma_collection=collection, llm="llm")  # type: ignore[arg-type]
    with Engine(reader, MemoryStore()) as engine:
        assert KVCacheTransform(llm=KVCacheLLM(engine=engine))([node(TEXTS[0])])
        assert entries(engine) == 1


# ---- Chroma


def test_adding_a_node_again_replaces_it(store: Any, engine: Engine) -> None:
    store.add([node("A first text that is long enough.")])
    before = set(engine.store.ids())
    store.add([node("A second text that is long enough.")])
    (found,) = store.get_nodes(["n"])
    assert found.get_content(MetadataMode.NONE) == "A second text that is long enough."
    assert entries(engine) == 1
    assert not set(engine.store.ids()) & before


def test_stale_metadata_do_not_stay(store: Any) -> None:
    first = node(TEXTS[0])
    first.metadata = {"old": "x"}
    store.add([first])
    store.add([node(TEXTS[0])])
    assert "old" not in store.client.get(ids=["n"])["metadatas"][0]


def test_more_nodes_than_the_client_takes_at_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.client, "batch", 7)
    monkeypatch.setattr("llama_index.vector_stores.kvrag.base._PAGE", 17)
    nodes = [node(f"The text with number {i} is here.", f"n{i}", f"d{i}") for i in range(40)]
    assert store.add(nodes) == [n.node_id for n in nodes]
    assert store.client.count() == 40
    assert store.reconcile().records == 40


def test_deleting_takes_the_caches_along(store: Any, engine: Engine) -> None:
    store.add([node(TEXTS[0], "a", "one"), node(TEXTS[1], "b", "one"), node(TEXTS[2], "c", "two")])
    store.add([node(TEXTS[2], "e", "three")])
    assert entries(engine) == 3, "equal texts have one entry"
    store.delete("two")
    assert entries(engine) == 3, "another document has it, too"
    store.delete_nodes(["a"])
    assert (entries(engine), store.client.count()) == (2, 2)
    store.add([node(TEXTS[1], "f", "one")])
    store.delete_nodes(["b"])
    assert entries(engine) == 2, "another node of the document has it, too"
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="document_id", value="three")]))
    assert entries(engine) == 1
    store.clear()
    assert (entries(engine), store.client.count()) == (0, 0)


def test_asynchronous_methods(store: Any, engine: Engine) -> None:
    async def main() -> None:
        await store.async_add([node(TEXTS[0], "a", "one"), node(TEXTS[1], "b", "two")])
        assert len(await store.aget_nodes(["a"])) == 1
        await store.adelete("one")
        assert entries(engine) == 1
        await store.adelete_nodes(["b"])
        await store.aclear()

    asyncio.run(main())
    assert entries(engine) == 0


def test_a_full_collection_gets_its_caches(collection: Any, llm: KVCacheLLM, engine: Engine) -> None:
    plain = ChromaVectorStore(chroma_collection=collection)
    plain.add([node(text, f"n{i}", f"d{i}") for i, text in enumerate(TEXTS)])
    context = kv_storage_context(collection, llm)
    report = context.vector_store.reconcile()
    assert (report.records, report.built, entries(engine)) == (3, 3, 3)
    plain.delete("d1")
    report = context.vector_store.reconcile()
    assert (report.records, report.removed, entries(engine)) == (2, 1, 2)


def test_from_documents_and_insert_and_delete(collection: Any, llm: KVCacheLLM, engine: Engine) -> None:
    context = kv_storage_context(collection, llm)
    index = VectorStoreIndex.from_documents(documents(*TEXTS), storage_context=context)
    assert entries(engine) == 3
    index.insert(Document(text="A ferry crosses the Mirrow twice a day.", doc_id="ferry"))
    assert entries(engine) == 4
    index.delete_ref_doc("ferry", delete_from_docstore=True)
    assert entries(engine) == 3
    index.update_ref_doc(Document(text="The lighthouse of Varn was torn down.", doc_id="doc2"))
    assert entries(engine) == 3
