"""Between retriever and prompt: load caches, leave out what does not fit, say afterwards what was used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    BaseCallbackManager,
    CallbackManagerForRetrieverRun,
    Callbacks,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from pydantic import ConfigDict, PrivateAttr

from kvrag.budget import Budget
from kvrag.ingested import known_of
from kvrag.store.key import EntryKey
from langchain_kvrag._hints import RELEVANCE, WATCH, prefetch_of, write_back
from langchain_kvrag._serving import Serving


class KVCacheCompressor(BaseDocumentCompressor):
    """Takes retrieved documents on their way to the model.

    It starts to load their caches, leaves out those that fit neither into a cache nor into the budget, and
    returns copies whose metadata say under "kvrag" how long each is and whether it has a cache. Once the
    model has answered, in the same run, they also say what share of its attention each document got: `mass`,
    `focus` (what the answer rests on), `question_mass`, `dropped_at`, `is_hit`.

    Use it in a `ContextualCompressionRetriever`, in `KVCacheRetriever`, or as a runnable behind a retriever.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Serving
    """The chat model or text model that will answer."""
    max_tokens: int | None = None
    """Of all documents together; None: what the model's window leaves, see `kvrag.budget.Budget`."""

    _budget: Budget | None = PrivateAttr(default=None)

    @property
    def budget(self) -> Budget:
        """What documents may take."""
        if self._budget is None:
            self._budget = Budget(
                self.model.running,
                self.model.document_form,
                max_tokens=self.max_tokens,
                answer_tokens=self.model.max_tokens,
            )
        return self._budget

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Copies of those documents that fit, in order.

        Args:
            documents: best first.
            query: unused.
            callbacks: of the run that asks.
        """
        engine = self.model.running
        lengths = [self.budget.length(document.page_content) for document in documents]
        kept = self.budget.fitting(lengths)
        copies = [_marked(documents[n], lengths[n], has_cache=self._has(documents[n])) for n in kept]
        texts = [document.page_content for document in copies]
        known_of(engine).see(texts)
        prefetch_of(engine).hint(texts, self.model.document_form)
        if isinstance(callbacks, BaseCallbackManager):
            WATCH.note(callbacks.parent_run_id, copies)
        return copies

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The same; counting tokens does not hold up the event loop."""
        return await asyncio.to_thread(self.compress_documents, documents, query, callbacks)

    def as_runnable(self) -> Runnable[list[Document], list[Document]]:
        """The same as a step of a chain: `retriever | compressor.as_runnable() | ...`."""

        def now(documents: list[Document], config: RunnableConfig) -> list[Document]:
            return list(self.compress_documents(documents, "", config.get("callbacks")))

        async def later(documents: list[Document], config: RunnableConfig) -> list[Document]:
            return list(await self.acompress_documents(documents, "", config.get("callbacks")))

        return RunnableLambda(now, later, name="KVCacheCompressor")

    def _has(self, document: Document) -> bool:
        engine = self.model.running
        if engine.store is None:
            return False
        encoder = engine.encoder(self.model.document_form)
        return EntryKey(encoder.fingerprint, encoder.tokenize(document.page_content)) in engine.store


class KVCacheRetriever(BaseRetriever):
    """A retriever whose documents go through a `KVCacheCompressor`."""

    base: BaseRetriever
    """Finds the documents."""
    compressor: KVCacheCompressor
    """Takes them on."""
    k: int | None = None
    """How many at most; None: as many as the base retriever finds."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        child, named = run_manager.get_child(), {**kwargs, **self._number(k)}
        found = self.base.invoke(query, {"callbacks": child}, **named)
        return list(self.compressor.compress_documents(found[: k or self.k], query, child))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        child, named = run_manager.get_child(), {**kwargs, **self._number(k)}
        found = await self.base.ainvoke(query, {"callbacks": child}, **named)
        return list(await self.compressor.acompress_documents(found[: k or self.k], query, child))

    def _number(self, k: int | None) -> dict[str, int]:
        """The number for retrievers that take one, so that they find enough."""
        wanted = k or self.k
        return {} if wanted is None or not self.base._expects_other_args else {"k": wanted}


def relevance(answer: AIMessage | Mapping[str, Any], documents: Sequence[Document]) -> list[Document]:
    """Copies of documents, with what an answer made of them under "kvrag" in their metadata.

    For chains that keep the model's message: it works wherever the two come from.

    Args:
        answer: a `ChatKVCache`'s message, or a generation's `generation_info` of a `KVCacheLLM`.
        documents: that may have been in the prompt; the others get an empty field.
    """
    told = answer.response_metadata if isinstance(answer, AIMessage) else answer
    copies = [document.model_copy(update={"metadata": {**document.metadata}}) for document in documents]
    for copy in copies:
        copy.metadata[RELEVANCE] = dict(copy.metadata.get(RELEVANCE) or {})
    write_back(copies, told.get("kvrag", {}).get("documents", []))
    return copies


def _marked(document: Document, num_tokens: int, *, has_cache: bool) -> Document:
    """A copy that carries our field: the original may be the retriever's own, and serve others at once."""
    field = {"num_tokens": num_tokens, "has_cache": has_cache}
    return document.model_copy(update={"metadata": {**document.metadata, RELEVANCE: field}})
