"""A memory block: messages that leave the short-term memory become documents with caches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import ChatMessage
from llama_index.core.memory.memory import BaseMemoryBlock

from kvrag import ConfigError, Corpus, Index
from kvrag.budget import Budget
from kvrag.store.references import References
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.llms.kvrag._hints import expect
from llama_index.llms.kvrag._messages import text_of

_SESSION, _NUMBER = "session", "number"


class KVCacheMemoryBlock(BaseMemoryBlock[str]):
    """Keeps the messages that `Memory` flushes, and brings back those that a question is about.

    Each flushed exchange (a message from the user and what follows) is a document of a corpus: found by
    Chroma, read by the model once, answered from its cache from then on. Those nearest to the newest messages
    that fit into `max_tokens` stand in the prompt, in the order in which they were said.

    >>> from llama_index.memory.kvrag import KVCacheMemoryBlock  # doctest: +SKIP
    >>> block = KVCacheMemoryBlock(llm=llm, path="memory")  # doctest: +SKIP
    >>> memory = Memory.from_defaults(memory_blocks=[block], tokenizer_fn=llm.tokenize)  # doctest: +SKIP
    """

    name: str = Field(default="earlier", description="The tag around what is brought back.")
    llm: KVCacheLLM = Field(description="The model that will answer.", exclude=True)
    path: str = Field(description="Folder of the Chroma database, or the address of a server.")
    collection: str = Field(default="memory", description="Name of the collection.")
    max_tokens: int = Field(default=512, description="Most tokens that are brought back.", gt=0)
    k: int = Field(default=8, description="Most exchanges that are looked at.", gt=0)
    num_messages: int = Field(default=2, description="How many newest messages are searched for.")

    _corpus: Corpus = PrivateAttr()
    _index: Index = PrivateAttr()
    _references: References = PrivateAttr()
    _budget: Budget = PrivateAttr()

    def __init__(self, llm: KVCacheLLM, path: str | Path, **fields: Any) -> None:
        """Open the corpus; it is made if there is none.

        Raises:
            ConfigError: the model keeps no caches, or an impossible setting.
            CorpusError: the database cannot be opened.
        """
        if not isinstance(llm, KVCacheLLM):
            raise ConfigError(f"llm is a {type(llm).__name__}; expected the KVCacheLLM that will answer")
        engine = llm.running
        if engine.store is None:
            raise ConfigError("the engine has no store to keep caches in; make it with store=...")
        super().__init__(**{"llm": llm, "path": str(path), **fields})
        encoder = engine.encoder(llm.form)
        folder: Any = getattr(engine.store, "path", None)
        self._references = References(None if folder is None else Path(folder) / "references.sqlite")
        self._index = Index.open(self.path, self.collection)
        self._corpus = Corpus(self._index, engine.store, encoder, references=self._references)
        self._budget = Budget(engine, llm.form, max_tokens=self.max_tokens)

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> str:
        return await asyncio.to_thread(self._find, messages or [], str(block_kwargs.get("session_id") or ""))

    async def _aput(self, messages: list[ChatMessage]) -> None:
        await asyncio.to_thread(self._keep, messages)

    async def atruncate(self, content: str, tokens_to_truncate: int) -> str | None:
        """What is brought back, without the exchanges that take so many tokens; the oldest go first."""
        exchanges = content.split("\n\n")
        while exchanges and tokens_to_truncate > 0:
            tokens_to_truncate -= self._budget.length(exchanges.pop(0))
        return "\n\n".join(exchanges) or None

    def close(self) -> None:
        """Let go of the collection; the model stays open."""
        self._index.close()
        self._references.close()

    def _keep(self, messages: Sequence[ChatMessage]) -> None:
        for session, exchange in _exchanges(messages):
            text = _written(exchange)
            if not 0 < self._budget.length(text) <= self.max_tokens:
                continue  # it could never be brought back
            number = sum(1 for record in self._corpus.documents() if record.metadata.get(_SESSION) == session)
            fields = {_SESSION: session, _NUMBER: number, "source": f"{session}#{number}"}
            self._corpus.upsert([text], [f"{session}#{number}"], metadatas=[fields], documents=[None])

    def _find(self, messages: Sequence[ChatMessage], session: str) -> str:
        query = "\n".join(text_of(message) for message in messages[-self.num_messages :])
        if not query.strip():
            return ""
        hits = self._corpus.search(query, self.k, where={_SESSION: session})
        kept = self._budget.fitting([self._budget.length(hit.text) for hit in hits])
        found = sorted((hits[number] for number in kept), key=lambda hit: hit.metadata[_NUMBER])
        texts = [hit.text for hit in found]
        expect(self.llm.running, texts)
        return "\n\n".join(texts)


def _exchanges(messages: Sequence[ChatMessage]) -> list[tuple[str, list[ChatMessage]]]:
    """Messages by session, a new group wherever the user begins to speak."""
    found: list[tuple[str, list[ChatMessage]]] = []
    for message in messages:
        session = str(message.additional_kwargs.get("session_id") or "")
        if not found or found[-1][0] != session or message.role == "user":
            found.append((session, []))
        found[-1][1].append(message)
    return found


def _written(messages: Sequence[ChatMessage]) -> str:
    """An exchange as text, without blank lines, which stand between exchanges."""
    said = [f"{message.role.value}: {' '.join(text_of(message).split())}" for message in messages]
    return "\n".join(line for line in said if line.partition(": ")[2])
