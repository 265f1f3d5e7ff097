"""A document store for retrievers that search small pieces and return whole documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.stores import BaseStore
from tqdm import tqdm

from kvrag import Engine, InputError
from kvrag.companion import CompanionReport
from kvrag.records import Record
from kvrag.shelf import Shelf
from langchain_kvrag._hints import prefetch_of, serve
from langchain_kvrag._serving import Serving, document_form


class KVDocStore(BaseStore[str, Document]):
    """Documents under keys, on disk, which the model reads when they are set, and never again.

    For `ParentDocumentRetriever` and `MultiVectorRetriever`, which paste what this store holds into prompts:
    a document's cache is built before it is written, replaced when its text changes, and removed when no
    document has its text any more. May be used from any thread; processes can share the folder.

    >>> from langchain_kvrag import ChatKVCache, KVDocStore  # doctest: +SKIP
    >>> model = ChatKVCache(store="caches")  # doctest: +SKIP
    >>> parents = KVDocStore("parents", engine=model)  # doctest: +SKIP

    Args:
        folder: where documents are kept, as JSON in one SQLite file; made if need be.
        engine: whose caches these are: a `ChatKVCache`, a `KVCacheLLM` or a `kvrag.Engine`.
        prefix: what documents are encoded behind; None: what the model says, else "template".
        remember: most documents of a folder that is opened, whose texts are looked for in prompts at once;
            others are when they are retrieved.

    Raises:
        StoreWriteError: the folder cannot be written to.
        CorpusError: its file is damaged, or of another version.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: Serving | Engine,
        prefix: str | None = None,
        remember: int = 10_000,
    ) -> None:
        self._holder = engine  # which closes its engine when nobody has it any more
        self._engine = engine.running if isinstance(engine, Serving) else engine
        self._form = document_form(engine, prefix)
        serve(self._engine, self._form)
        self._shelf = Shelf(folder, self._engine, self._form, remember=remember, retrieved=self._expect)

    def mget(self, keys: Sequence[str]) -> list[Document | None]:
        """Documents in the order of the keys; None where there is none. Their caches begin to load.

        Raises:
            CorpusError: the file is damaged.
        """
        return [None if record is None else _document(record) for record in self._shelf.get(keys)]

    def mset(self, key_value_pairs: Sequence[tuple[str, Document]]) -> None:
        """Read documents and keep them; of those with one key, the last. Can be interrupted and repeated.

        Raises:
            InputError: a value is no Document, or its metadata are not of JSON; nothing has changed.
            CorpusLocked: another process has been writing for half a minute.
            StoreWriteError: the disk is full, or read-only.
        """
        self._shelf.set({key: _record(key, value) for key, value in key_value_pairs})

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove documents, and the caches that nobody else needs; missing keys are no error.

        Raises:
            CorpusLocked: another process has been writing for half a minute.
            StoreWriteError: the disk is full, or read-only; nothing has changed.
        """
        self._shelf.delete(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Generator[str, None, None]:
        """Keys that begin so, in order; changes may be made meanwhile."""
        for page in self._shelf.names(prefix or ""):
            yield from page

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncGenerator[str, None]:
        """The same; the file is read in a thread, a thousand keys at a time."""
        pages = self._shelf.names(prefix or "")
        while page := await asyncio.to_thread(next, pages, None):
            for key in page:
                yield key

    def reconcile(self, *, progress: bool = False) -> CompanionReport:
        """Make the caches what the folder says, after a crash, or for another model or store.

        What is there already is not built again, so that an interrupted call can be repeated.

        Args:
            progress: show a bar.

        Raises:
            ConfigError: the engine keeps no caches.
        """
        with tqdm(desc="reading documents", unit="doc", disable=not progress) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return self._shelf.reconcile(tell)

    def close(self) -> None:
        """Let go of the folder and of the references; the engine stays open."""
        self._shelf.close()

    def __enter__(self) -> Self:
        """Close on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _expect(self, texts: list[str]) -> None:
        prefetch_of(self._engine).hint(texts, self._form)


def _record(key: str, value: Any) -> Record:
    """What is kept of a document: everything that it has.

    Raises:
        InputError: it is no Document, or has fields of its own.
    """
    if not isinstance(value, Document):
        raise InputError(
            f"{key!r}: KVDocStore keeps Documents, which the model can read; got {type(value).__name__}"
        )
    more = set(type(value).model_fields) - set(Document.model_fields)
    if more:
        raise InputError(
            f"{key!r}: a {type(value).__name__} has fields that a Document has not "
            f"({', '.join(sorted(more))}); put them into its metadata"
        )
    return Record(value.page_content, {"metadata": value.metadata, "id": value.id})


def _document(record: Record) -> Document:
    return Document(page_content=record.text, **record.fields)
