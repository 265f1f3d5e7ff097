"""LlamaIndex's Chroma vector store with caches that live and die with its nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.storage.storage_context import StorageContext
from llama_index.core.vector_stores.types import (
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from kvrag import ConfigError, MissingExtra
from kvrag.companion import CompanionReport
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.llms.kvrag._caches import OWNER, NodeCaches

try:
    from llama_index.vector_stores.chroma import ChromaVectorStore
except ImportError as error:
    raise MissingExtra("llama-index-vector-stores-chroma", "llama-index") from error

_PAGE = 1000


class _Upserting:
    """Stands in for a collection: adding replaces, and goes in batches as large as the client takes."""

    def __init__(self, collection: Any) -> None:
        self._collection = collection
        # The limit is the client's; a collection has its client under this name only.
        self.batch: int = collection._client.get_max_batch_size()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._collection, name)

    def add(self, ids: list[str], metadatas: list[dict[str, Any]], **fields: list[Any]) -> None:
        for start in range(0, len(ids), self.batch):
            part = slice(start, start + self.batch)
            found = self._collection.get(ids=ids[part], include=["metadatas"])
            before = dict(zip(found["ids"], found["metadatas"], strict=True))
            # Chroma merges metadata; what is not to stay has to be set to None.
            rows = [
                {**dict.fromkeys(before.get(i) or {}), **m}
                for i, m in zip(ids[part], metadatas[part], strict=True)
            ]
            chosen = {name: values[part] for name, values in fields.items()}
            self._collection.upsert(ids=ids[part], metadatas=rows, **chosen)


class KVChromaVectorStore(ChromaVectorStore):
    """A Chroma vector store whose nodes are read by the model when they are added, and never again.

    Differs from its base in what would go wrong there: adding a node again replaces its text (Chroma keeps
    the old one without a word), any number of nodes can be added (Chroma takes some thousands at a time), and
    the asynchronous methods do not block the event loop.

    >>> from llama_index.vector_stores.kvrag import KVChromaVectorStore  # doctest: +SKIP
    >>> store = KVChromaVectorStore(chroma_collection=collection, llm=llm)  # doctest: +SKIP
    """

    owner: str = Field(
        default=OWNER, description="Name of the index; each that shares a store has its own name."
    )

    _caches: NodeCaches = PrivateAttr()

    def __init__(self, llm: KVCacheLLM, owner: str = OWNER, **fields: Any) -> None:
        """Accompany a collection.

        Args:
            llm: the model that will answer.
            owner: name of the index, the same as its `KVCacheTransform`'s.
            fields: as of `ChromaVectorStore`.

        Raises:
            ConfigError: the model keeps no caches.
        """
        if not isinstance(llm, KVCacheLLM):
            raise ConfigError(f"llm is a {type(llm).__name__}; expected the KVCacheLLM that will answer")
        super().__init__(**fields)
        self.owner = owner
        self._caches = NodeCaches(llm.running, llm.form, owner)
        self._collection: Any = _Upserting(self._collection)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "KVChromaVectorStore"

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Add nodes, or replace those that are there; their caches are built before they are written."""
        last = list({node.node_id: node for node in nodes}.values())
        for start in range(0, len(last), _PAGE):
            batch = last[start : start + _PAGE]
            before = list(self._get(limit=None, where={}, ids=[node.node_id for node in batch]).nodes or ())
            freed = self._caches.build(batch)
            super().add(batch, **add_kwargs)
            self._drop(before)
            self._caches.collect(freed)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document's nodes and their caches."""
        before = self._where({"document_id": ref_doc_id})
        super().delete(ref_doc_id, **delete_kwargs)
        self._caches.drop_nodes(before)
        self._caches.drop_documents([ref_doc_id])

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: Any = None, **delete_kwargs: Any
    ) -> None:
        """Delete nodes and their caches; `filters` are `MetadataFilters`."""
        before = self.get_nodes(node_ids, filters) if node_ids or filters else []
        if before:  # the base class deletes nothing by filters alone: Chroma refuses its empty list of ids
            super().delete_nodes([node.node_id for node in before])
        self._drop(before)

    def clear(self) -> None:
        """Delete all nodes and their caches."""
        before = self._all()
        if before:  # Chroma refuses to delete nothing
            super().clear()
        self._caches.drop_nodes(before)
        self._caches.drop_documents(self._caches.documents())

    def reconcile(self) -> CompanionReport:
        """Make the caches what the collection says, after a crash or after it was written past this object.

        For a collection that is full already, this builds all its caches; what is there is not built again.
        """
        return self._caches.reconcile(list(self._all()))

    def _drop(self, before: Sequence[BaseNode]) -> None:
        """Caches of nodes that are gone, unless another node of the document has the same text."""
        if not before:
            return
        documents = {node.ref_doc_id for node in before if node.ref_doc_id}
        left = [node for document in documents for node in self._where({"document_id": document})]
        self._caches.drop_nodes(before)
        if left:
            self._caches.collect(self._caches.build(left))

    def _where(self, where: dict[str, Any]) -> list[BaseNode]:
        return list(self._get(limit=None, where=where).nodes or ())

    def _all(self) -> Sequence[BaseNode]:
        found: list[BaseNode] = []
        while page := self._get(limit=_PAGE, where={}, offset=len(found)).nodes:
            found += page
        return found

    # ---- the base class's asynchronous methods block the event loop

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """The same as `add`."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """The same as `delete`."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: Any = None, **kwargs: Any
    ) -> None:
        """The same as `delete_nodes`."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """The same as `clear`."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(self, node_ids: list[str] | None = None, filters: Any = None) -> list[BaseNode]:
        """The same as `get_nodes`."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The same as `query`."""
        return await asyncio.to_thread(self.query, query, **kwargs)


def kv_storage_context(chroma_collection: Any, llm: KVCacheLLM, **named: Any) -> StorageContext:
    """A storage context whose vector store is a `KVChromaVectorStore`, for `VectorStoreIndex`.

    Args:
        chroma_collection: of any Chroma client.
        llm: the model that will answer.
        named: more arguments of `StorageContext.from_defaults`, or `owner` of the vector store's.
    """
    owner = named.pop("owner", OWNER)
    store = KVChromaVectorStore(chroma_collection=chroma_collection, llm=llm, owner=owner)
    return StorageContext.from_defaults(vector_store=store, **named)
