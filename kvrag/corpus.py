"""Index and store in lockstep: what the Chroma collection holds has its prebuilt cache, and nothing else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from kvrag.errors import (
    ConfigError,
    DocumentNotFound,
    DocumentTooLong,
    DuplicateDocument,
    EmptyDocument,
    InputError,
    StoreWriteError,
)
from kvrag.index import Hit, Index, Metadata, Record, already_there
from kvrag.reports import CorpusStats, IngestReport, ReconcileReport
from kvrag.segments import KV
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey, Fingerprint, tagged_digest
from kvrag.store.references import References

__all__ = ["Corpus", "CorpusStats", "Encoder", "Hit", "IngestReport", "ReconcileReport", "Record"]

logger = logging.getLogger(__name__)

KEY_FIELD = "kvrag_key"
"""The metadata field that names a record's entry in the store."""

Progress = Callable[[int, int], None]
"""Called with (documents done, documents in all) after every batch."""


class Encoder(Protocol):
    """What reads texts for the corpus; the engine is one."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What its entries depend on besides their text."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest document it can read."""
        ...

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Tokens of a document."""
        ...

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        """Keys and values of documents, in order; each does not depend on the others."""
        ...


@dataclass(frozen=True, slots=True)
class _Item:
    id: str
    text: str
    metadata: dict[str, Any]
    key: EntryKey


class Corpus:
    """Documents that are found by Chroma and answered from the store.

    Every change goes in this order, batch by batch, so that a crash leaves at worst something that
    `reconcile` mends, and never a reference to the wrong rows:

    | add, upsert, update | reference -> entry -> Chroma -> entries nobody refers to any more |
    | delete              | Chroma -> reference -> entries nobody refers to any more          |

    (The reference comes first, so that nobody who shares the store takes the entry for an orphan.)
    Not even `reconcile` is needed for right answers: a record without entry is read anew.

    Args:
        index: the collection.
        store: where entries are kept; several collections may share it.
        encoder: reads the texts.
        references: who refers to which entry; None: a file in the store's folder, or for a store without
            a `path`, in memory.
        batch_size: documents per batch; a batch is encoded and written as a whole.
    """

    def __init__(
        self,
        index: Index,
        store: KVStore,
        encoder: Encoder,
        *,
        references: References | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self._index = index
        self._store = store
        self._encoder = encoder
        self._references = references or References(_references_file(store))
        self._batch_size = batch_size
        self._uncached = 0
        self._warned = False
        self._lock = threading.RLock()

    def key_of(self, text: str) -> EntryKey:
        """The key under which the store keeps this text.

        Raises:
            EmptyDocument: no token.
            DocumentTooLong: more tokens than the model reads.
        """
        tokens = self._encoder.tokenize(text) if text.strip() else ()
        if not tokens:
            raise EmptyDocument("a document without text: nothing to encode")
        if len(tokens) > self._encoder.max_tokens:
            raise DocumentTooLong(
                f"{len(tokens)} tokens, the model reads {self._encoder.max_tokens} at most; cut it with "
                f"kvrag.documents.split(text, tokenize, {self._encoder.max_tokens}). It begins: {text[:60]!r}"
            )
        return EntryKey(self._encoder.fingerprint, tokens)

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add new documents to collection and store; their ids.

        Args:
            texts: documents, each at most `encoder.max_tokens` long.
            ids: by default derived from text and metadata "source".
            metadatas: str, int, float or bool by name, one mapping per text.
            progress: called after every batch.

        Raises:
            DuplicateDocument: an id that is there or stands twice; nothing was written.
            EmptyDocument, DocumentTooLong, InputError: nothing was written.
            CorpusLocked: another process is writing; nothing was written.
        """
        with self._lock:
            items = self._items(texts, ids, metadatas)
            taken = self._index.existing([item.id for item in items])
            if taken:
                raise DuplicateDocument(already_there(taken))
            self._write(items, self._index.add, progress)
            return [item.id for item in items]

    def ingest(
        self,
        texts: Sequence[str],
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Add those documents that are not there yet, so that an interrupted run can be repeated.

        Ids derive from text and source: a text that stands twice in one source is one document.

        Raises:
            EmptyDocument, DocumentTooLong, InputError, CorpusLocked: nothing was written.
        """
        with self._lock:
            metadatas = [{}] * len(texts) if metadatas is None else metadatas
            ids = [_content_id(text, m or {}) for text, m in zip(texts, metadatas, strict=True)]
            there = self._index.existing(list(dict.fromkeys(ids)))
            new = {i: n for n, i in reversed(list(enumerate(ids))) if i not in there}
            numbers = sorted(new.values())
            items = self._items([texts[n] for n in numbers], None, [metadatas[n] for n in numbers])
            self._write(items, self._index.add, progress)
            return IngestReport(tuple(ids), added=len(items), skipped=len(ids) - len(items))

    def upsert(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add documents, or replace text and metadata of those whose id is there; their ids.

        Raises:
            DuplicateDocument: an id stands twice; nothing was written.
            EmptyDocument, DocumentTooLong, InputError, CorpusLocked: nothing was written.
        """
        with self._lock:
            items = self._items(texts, ids, metadatas)
            self._write(items, self._index.upsert, progress)
            return [item.id for item in items]

    def update(
        self,
        ids: Sequence[str],
        *,
        texts: Sequence[str] | None = None,
        metadatas: Sequence[Metadata] | None = None,
    ) -> None:
        """Change texts, metadata or both of documents that are there.

        Metadata is merged with what is there; None as a value removes a field.

        Raises:
            DocumentNotFound: an id that is not there; nothing was written.
            DuplicateDocument: an id stands twice; nothing was written.
            EmptyDocument, DocumentTooLong, InputError, CorpusLocked: nothing was written.
        """
        with self._lock:
            before = self._found(ids)
            changes = [{}] * len(ids) if metadatas is None else [_clean(m) for m in metadatas]
            if texts is None:
                self._index.check_records(ids, [r.text for r in before], changes)
                told = [(i, change) for i, change in zip(ids, changes, strict=True) if change]
                self._index.update_metadata([i for i, _ in told], [change for _, change in told])
                return
            merged = [
                {k: v for k, v in {**record.metadata, **change}.items() if v is not None}
                for record, change in zip(before, changes, strict=True)
            ]
            self._write(self._items(texts, ids, merged), self._index.upsert, None)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents; the bytes of entries that no document of any collection refers to go with them.

        Raises:
            DocumentNotFound: an id that is not there; nothing was removed.
            StoreWriteError: gone from the collection, but the store cannot be written; `reconcile` later.
            CorpusLocked: another process is writing; nothing was removed.
        """
        with self._lock:
            ids = list(dict.fromkeys(ids))
            # Also the entries that records name: a reference may have been lost.
            named = [str(record.metadata.get(KEY_FIELD, "")) for record in self._found(ids)]
            self._index.delete(ids)
            freed = self._references.remove(self._index.id, ids)
            self._references.collect([*freed, *named], self._store.delete)

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Documents by id, in this order.

        Raises:
            DocumentNotFound: an id that is not there.
        """
        return [Record(r.id, r.text, _clean(r.metadata)) for r in self._found(ids)]

    def search(self, query: str, k: int = 5, *, where: Mapping[str, Any] | None = None) -> list[Hit]:
        """The `k` documents nearest to a text, nearest first.

        Args:
            query: usually the question.
            k: how many at most.
            where: a Chroma filter on metadata.

        Raises:
            InputError: k is below 1.
        """
        hits = self._index.search(query, k, where=where)
        return [Hit(h.id, h.text, _clean(h.metadata), h.distance) for h in hits]

    def documents(self) -> Iterator[Record]:
        """All documents, in no particular order."""
        for record in self._index.records():
            yield Record(record.id, record.text, _clean(record.metadata))

    def reconcile(self, *, verify: bool = True, progress: Progress | None = None) -> ReconcileReport:
        """Make store and references what the collection says, after a crash or a change behind our back.

        With a Chroma server, not to be run while another process changes the same collection.

        Args:
            verify: read every entry's bytes, too, and replace what is damaged.
            progress: called with (records done, records in all).

        Raises:
            StoreWriteError: the store cannot be written.
            CorpusLocked: records have to be relabelled and another process is writing.
        """
        with self._lock:
            check = self._store.check(fix=True) if verify else None
            total, owner = self._index.count(), self._index.id
            wanted: dict[str, str] = {}
            unencodable: list[str] = []
            rebuilt = relabelled = 0
            freed: list[str] = []
            for batch in _batches(list(self._index.records()), self._batch_size):
                items = [item for record in batch if (item := self._item_of(record, unencodable))]
                wanted.update((item.id, item.key.id) for item in items)
                freed += self._references.add(owner, {item.id: item.key.id for item in items})
                rebuilt += self._encode_missing(items)
                relabelled += self._relabel(items)
                if progress is not None:
                    progress(len(wanted) + len(unencodable), total)
            stale = [record for record in self._references.of(owner) if record not in wanted]
            self._references.remove(owner, stale)
            removed = self._references.collect(self._store.ids(), self._store.delete)
            return ReconcileReport(
                records=len(wanted) + len(unencodable),
                rebuilt=rebuilt,
                removed=len(removed),
                relabelled=relabelled,
                unreferenced=len(stale),
                damaged=len(check.damaged) + len(check.orphans) if check else 0,
                unencodable=tuple(unencodable),
            )

    def stats(self) -> CorpusStats:
        """Sizes and counts."""
        return CorpusStats(documents=self._index.count(), uncached=self._uncached, store=self._store.stats())

    def close(self) -> None:
        """Close collection, references and store; what was written stays."""
        self._index.close()
        self._references.close()
        self._store.close()

    def __enter__(self) -> Corpus:
        """The corpus itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _items(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None,
        metadatas: Sequence[Metadata | None] | None,
    ) -> list[_Item]:
        """Texts with ids, clean metadata and keys; everything that can be refused is refused here."""
        metadatas = [None] * len(texts) if metadatas is None else metadatas
        if not len(texts) == len(metadatas) == (len(texts) if ids is None else len(ids)):
            raise InputError("texts, ids and metadatas must be of one length")
        cleaned = [_clean(metadata or {}) for metadata in metadatas]
        ids = list(map(_content_id, texts, cleaned)) if ids is None else list(ids)
        self._index.check_records(ids, texts, cleaned)
        items = []
        for record_id, text, metadata in zip(ids, texts, cleaned, strict=True):
            try:
                key = self.key_of(text)
            except InputError as error:
                raise type(error)(f"document {record_id!r}: {error}") from error
            items.append(_Item(record_id, text, metadata, key))
        return items

    def _item_of(self, record: Record, unencodable: list[str]) -> _Item | None:
        try:
            return _Item(record.id, record.text, record.metadata, self.key_of(record.text))
        except InputError:
            unencodable.append(record.id)
            return None

    def _found(self, ids: Sequence[str]) -> list[Record]:
        found = self._index.get(ids)
        missing = set(ids) - {record.id for record in found}
        if missing:
            raise DocumentNotFound(f"the corpus holds no document with the id {min(missing)!r}")
        return found

    def _write(
        self,
        items: list[_Item],
        into_index: Callable[[Sequence[str], Sequence[str], Sequence[Metadata]], None],
        progress: Progress | None,
    ) -> None:
        done, can_store = 0, True
        self._index.begin_writing()
        for batch in _batches(items, self._batch_size):
            freed: list[str] = []
            if can_store:
                try:
                    freed = self._references.add(self._index.id, {item.id: item.key.id for item in batch})
                    self._encode_missing(batch)
                except StoreWriteError as error:
                    # Encoding the rest for nothing would take long; the next call tries again.
                    can_store = False
                    self._warn(error)
            if not can_store:
                self._uncached += sum(item.key not in self._store for item in batch)
            into_index(
                [item.id for item in batch],
                [item.text for item in batch],
                [{**item.metadata, KEY_FIELD: item.key.id} for item in batch],
            )
            if freed:
                self._references.collect(freed, self._store.delete)
            done += len(batch)
            if progress is not None:
                progress(done, len(items))

    def _encode_missing(self, items: Sequence[_Item]) -> int:
        """Encode and put what the store lacks; how many entries that were."""
        missing = list({item.key.id: item.key for item in items if item.key not in self._store}.values())
        if missing:
            rows = self._encoder.encode([key.tokens for key in missing])
            for key, kv in zip(missing, rows, strict=True):
                self._store.put(key, kv)
        return len(missing)

    def _relabel(self, items: Sequence[_Item]) -> int:
        wrong = [item for item in items if item.metadata.get(KEY_FIELD) != item.key.id]
        if wrong:
            self._index.update_metadata(
                [item.id for item in wrong], [{KEY_FIELD: item.key.id} for item in wrong]
            )
        return len(wrong)

    def _warn(self, error: StoreWriteError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "documents are kept without prebuilt caches and read anew when asked for: %s", error
            )


def _references_file(store: KVStore) -> Path | None:
    path = getattr(store, "path", None)
    return None if path is None else Path(path) / "references.sqlite"


def _content_id(text: str, metadata: Metadata) -> str:
    """96 bits of a digest of text and source."""
    fields: dict[str, str | int | bytes] = {
        "text": _raw(text),
        "source": _raw(str(metadata.get("source", ""))),
    }
    return tagged_digest(fields)[:24]


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # lone surrogates are refused later, with a clear error


def _clean(metadata: Metadata) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != KEY_FIELD}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
