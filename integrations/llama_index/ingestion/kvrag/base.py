"""A step of an ingestion pipeline that reads every node once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore

from kvrag import ConfigError
from kvrag.companion import CompanionReport
from kvrag.store.key import tagged_digest
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.llms.kvrag._caches import OWNER, NodeCaches
from llama_index.llms.kvrag._engine import EngineFields


class KVCacheTransform(EngineFields, TransformComponent):
    """Builds the caches of nodes; a step behind splitters and extractors, whose metadata are read, too.

    It hands the nodes on as they are. A document's former caches go when its nodes come again; those of
    documents that vanished go with `KVChromaVectorStore`, or else with `follow`.

    >>> from llama_index.ingestion.kvrag import KVCacheTransform  # doctest: +SKIP
    >>> IngestionPipeline([splitter, KVCacheTransform(llm=llm), embedding])  # doctest: +SKIP

    The pipeline's own cache skips a step whose input and settings have not changed; the model's fingerprint
    is among the settings, so that another model builds its own. `reconcile` builds what was lost meanwhile.
    In several workers, each loads the model by its settings: name `model` and `store`, give no `engine`.
    """

    owner: str = Field(
        default=OWNER, description="Name of the index; each that shares a store has its own name."
    )

    _caches: NodeCaches | None = PrivateAttr(default=None)

    def __init__(self, llm: KVCacheLLM | None = None, **fields: Any) -> None:
        """Build caches for a model.

        Args:
            llm: the model that will answer, instead of the fields that make an engine.
            fields: see the class.

        Raises:
            ConfigError: the model keeps no caches, or an impossible setting.
        """
        if llm is not None and not isinstance(llm, KVCacheLLM):
            raise ConfigError(f"llm is a {type(llm).__name__}; expected a KVCacheLLM")
        super().__init__(**{**(llm.engine_fields() if llm is not None else {}), **fields})
        if self.store is None and (self.engine is None or self.engine.store is None):
            raise ConfigError("there is no store to keep caches in; make the model with store=...")

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "KVCacheTransform"

    @property
    def caches(self) -> NodeCaches:
        """The caches of the index; opened now if they are not yet."""
        if self._caches is None:
            self._caches = NodeCaches(self.running, self.form, self.owner)
        return self._caches

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The settings and what entries depend on: by it the pipeline knows whether to build anew."""
        depends_on = self.running.encoder(self.form).fingerprint.fields()
        return {**super().to_dict(**kwargs), "fingerprint": tagged_digest({**depends_on})}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Build the nodes' caches; the nodes as they came."""
        if nodes:
            self.caches.replace(nodes)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same without blocking the event loop."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def reconcile(self, nodes: Sequence[BaseNode]) -> CompanionReport:
        """Make the caches what an index says: lost ones are built, those of nodes that are gone removed.

        Args:
            nodes: all of the index, such as a pipeline's result, or `vector_store.get_nodes(None)`.
        """
        return self.caches.reconcile(nodes)

    def follow(self, docstore: BaseDocumentStore) -> list[str]:
        """Remove the caches of documents that a document store no longer has; their ids.

        For pipelines with another vector store than ours, after `run`.
        """
        gone = sorted(self.caches.documents() - set(docstore.get_all_document_hashes().values()))
        self.caches.drop_documents(gone)
        return gone

    def __getstate__(self) -> dict[Any, Any]:
        """Without the open file of references."""
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**state["__pydantic_private__"], "_caches": None}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Take the settings."""
        BaseModel.__setstate__(self, state)
