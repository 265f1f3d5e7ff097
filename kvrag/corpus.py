"""Index and store in lockstep: what the Chroma collection holds has its prebuilt cache, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from kvrag.chroma_rows import Hit, Record
from kvrag.config import Context
from kvrag.contexts import Contexts
from kvrag.errors import (
    ConfigError,
    DocumentNotFound,
    DuplicateDocument,
    InputError,
)
from kvrag.following import Followers
from kvrag.index import Index, Metadata, already_there
from kvrag.items import KEY_FIELD, Encoder, Item, clean
from kvrag.known import MAX_CHARS, KnownTexts
from kvrag.lockstep import Lockstep, Progress
from kvrag.parts import DOCUMENT_FIELD, PART_FIELD, Places, document_of, part_of
from kvrag.reports import CorpusStats, Deletion, IngestReport, ReconcileReport, RenewReport, WarmReport
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey, tagged_digest
from kvrag.store.references import References
from kvrag.tiers import Tier
from kvrag.warming import Order, warm

__all__ = [
    "KEY_FIELD",
    "Corpus",
    "CorpusStats",
    "Deletion",
    "Encoder",
    "Hit",
    "IngestReport",
    "ReconcileReport",
    "Record",
    "RenewReport",
    "WarmReport",
]


class Corpus:
    """Documents that are found by Chroma and answered from the store.

    Every change goes in this order, batch by batch, so that a crash leaves at worst something that
    `reconcile` mends, and never a reference to the wrong rows:

    | add, upsert, update | reference -> entry -> Chroma -> entries nobody refers to any more |
    | delete              | Chroma -> reference -> entries nobody refers to any more          |

    (The reference comes first, so that nobody who shares the store takes the entry for an orphan.)
    Not even `reconcile` is needed for right answers: a record without entry is read anew.

    With a `context`, each document's entry is encoded behind the parts before it, or behind its most similar
    documents (see `kvrag.contexts`), which are found only among what Chroma has already, so that changes go

    | add, upsert, update | Chroma -> entries that tell of replaced texts -> reference -> entry -> label |
    | delete              | Chroma -> reference -> entries -> the same for documents left behind          |

    where the label is metadata that names entry and context; a record without is one to `reconcile`.

    A text is a part of the document that `documents` names in the call that brings it, by default of its
    metadata's "source". Parts stand in the order in which they come; those of later calls come behind.

    Args:
        index: the collection.
        store: where entries are kept; several collections may share it.
        encoder: reads the texts.
        references: who refers to which entry; None: a file in the store's folder, or for a store without
            a `path`, in memory.
        batch_size: documents per batch; a batch is encoded and written as a whole.
        context: what each document is encoded behind; None: as the collection was built, a new one behind
            nothing. A collection that was built so is extended with it; `renew_contexts` then encodes
            documents anew that are there already.

    Raises:
        ConfigError: the collection was built with another context, or an impossible argument.
    """

    def __init__(
        self,
        index: Index,
        store: KVStore,
        encoder: Encoder,
        *,
        references: References | None = None,
        batch_size: int = 32,
        context: Context | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self._index = index
        self._store = store
        self._contexts = Contexts(index, encoder, context)
        self._references = references or References.beside(store)
        self._lockstep = Lockstep(index, store, encoder, self._contexts, self._references, batch_size)
        self._lock = threading.RLock()
        self._followers = Followers(self._contexts.pieces)

    def key_of(self, text: str) -> EntryKey:
        """The key under which the store keeps this text, encoded behind the prefix alone.

        Raises:
            EmptyDocument: no token.
            DocumentTooLong: more tokens than the model reads.
        """
        return self._contexts.key_of(text)

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        documents: Sequence[str | None] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add new documents to collection and store; their ids.

        Args:
            texts: documents, each at most `encoder.max_tokens` long.
            ids: by default derived from text and metadata "source".
            metadatas: str, int, float or bool by name, one mapping per text.
            documents: names of what the texts are parts of, None for none; by default metadata "source".
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
            places = self._place(items, documents)
            self._lockstep.write(_at(items, places), self._index.add, progress)
            self._followers.tell(_texts(items))
            return [item.id for item in items]

    def ingest(
        self,
        texts: Sequence[str],
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        documents: Sequence[str | None] | None = None,
        instead_of: Sequence[str] = (),
        refill: bool = True,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Add those documents that are not there yet, so that an interrupted run can be repeated.

        Ids derive from text and source: a text that stands twice in one source is one document. Those that
        are there get the entries that they lack (for another model, say). Parts of one document are in the
        order of this call, where the first of them stood that was there.

        Args:
            texts: see `add`.
            metadatas: see `add`.
            documents: see `add`.
            instead_of: ids of what these texts replace; those that are not among them are removed.
            refill: build entries again that were evicted; not for a store that is full: others would go.
            progress: called after every batch.

        Raises:
            EmptyDocument, DocumentTooLong, InputError, CorpusLocked: nothing was written.
            StoreWriteError: what is replaced is gone from the collection, but not from the store; `reconcile`
                later.
        """
        with self._lock:
            metadatas = [{}] * len(texts) if metadatas is None else metadatas
            ids = [_content_id(text, m or {}) for text, m in zip(texts, metadatas, strict=True)]
            there = self._index.existing(list(dict.fromkeys(ids)))
            new = {i: n for n, i in reversed(list(enumerate(ids))) if i not in there}
            numbers = sorted(new.values())
            items = self._items([texts[n] for n in numbers], None, [metadatas[n] for n in numbers])
            first = {i: n for n, i in reversed(list(enumerate(ids)))}
            names = _documents(metadatas, documents)
            gone = list(dict.fromkeys(i for i in instead_of if i not in first))
            order = sorted(first, key=first.__getitem__)
            places = self._contexts.parts.place(
                order, [names[first[i]] for i in order], as_listed=True, without=gone
            )
            kept = [i for i in order if i in there]
            moved = places.moved | {
                record.id: places.of[record.id]
                for record in self._index.get(kept)
                if record.id in places.of and places.of[record.id] != (document_of(record), part_of(record))
            }
            self._lockstep.write(_at(items, places), self._index.add, progress, moved=moved, gone=gone)
            completed = self._lockstep.complete(kept, progress, refill=refill)
            self._followers.tell(_texts(items), gone)
            return IngestReport(tuple(ids), len(items), len(ids) - len(items), completed)

    def upsert(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        documents: Sequence[str | None] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add documents, or replace text and metadata of those whose id is there; their ids.

        Raises:
            DuplicateDocument: an id stands twice; nothing was written.
            EmptyDocument, DocumentTooLong, InputError, CorpusLocked: nothing was written.
        """
        with self._lock:
            items = self._items(texts, ids, metadatas)
            places = self._place(items, documents)
            self._lockstep.write(_at(items, places), self._index.upsert, progress)
            self._followers.tell(_texts(items))
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
            changes = [{}] * len(ids) if metadatas is None else [clean(m) for m in metadatas]
            if texts is None:
                self._index.check_records(ids, [r.text for r in before], changes)
                told = [(i, change) for i, change in zip(ids, changes, strict=True) if change]
                self._index.update_metadata([i for i, _ in told], [change for _, change in told])
                return
            merged = [
                {k: v for k, v in {**record.metadata, **change}.items() if v is not None}
                for record, change in zip(before, changes, strict=True)
            ]
            items = self._items(texts, ids, merged)
            places = Places({r.id: (d, part_of(r)) for r in before if (d := document_of(r)) is not None})
            self._lockstep.write(_at(items, places), self._index.upsert)
            self._followers.tell(_texts(items))

    def delete(self, ids: Sequence[str]) -> Deletion:
        """Remove documents; the bytes of entries that no document of any collection refers to go with them.

        So do entries of other documents that were encoded behind them; those are built anew, behind what is
        left or behind others.

        An embedded Chroma may hold the bytes of their texts in its file for a while: see `Index.forget`.

        Returns:
            What was erased, in every tier of the store.

        Raises:
            DocumentNotFound: an id that is not there; nothing was removed.
            StoreWriteError: gone from the collection, but the store cannot be written; `reconcile` later.
            CorpusLocked: another process is writing; nothing was removed.
        """
        with self._lock:
            ids = list(dict.fromkeys(ids))
            records = self._found(ids)
            telling = self._contexts.telling(records)
            following = self._contexts.following(records)
            # Also the entries that records name: a reference may have been lost.
            told = self._contexts.entries([*records, *telling])
            named = self._references.named(self._index.id, ids)
            self._index.delete(ids)
            self._followers.tell({}, ids)
            receipts = self._lockstep.let_go([*ids, *(record.id for record in telling)], told)
            if self._contexts.can_encode:
                behind = dict.fromkeys([*(record.id for record in telling), *following])
                self._lockstep.settle([i for i in behind if i not in set(ids)])
            kept = sorted(key for key in set(named.values()) if self._references.count(key))
            return Deletion(tuple(ids), self._index.name, tuple(receipts), tuple(kept), time.time())

    def forget(self) -> bool:
        """Overwrite what Chroma's file still holds of deleted texts; false if only a server can."""
        with self._lock:
            return self._index.forget()

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Documents by id, in this order.

        Raises:
            DocumentNotFound: an id that is not there.
        """
        return [Record(r.id, r.text, clean(r.metadata)) for r in self._found(ids)]

    def entries_of(self, ids: Sequence[str]) -> dict[str, str]:
        """For documents by id, the name of the entry that they refer to, if they refer to one."""
        return self._references.named(self._index.id, ids)

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
        return [replace(hit, metadata=clean(hit.metadata)) for hit in hits]

    def documents(self) -> Iterator[Record]:
        """All documents, in no particular order."""
        for record in self._index.records():
            yield Record(record.id, record.text, clean(record.metadata))

    def contexts(self, ids: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """For documents by id, the texts that they are encoded behind, in the order of a prompt.

        Ids that are not there are left out; all of them in a corpus whose documents stand behind nothing.
        """
        return self._contexts.texts(ids)

    def known(
        self,
        tiers: Collection[Tier] = (),
        *,
        into: KnownTexts | None = None,
        max_chars: int = MAX_CHARS,
    ) -> KnownTexts:
        """A registry of all documents by id, for an engine that is to find them in prompts.

        The collection is read in pages. What this object adds, replaces or deletes afterwards is changed in
        the registry as well; what others change is not. What documents are encoded behind is asked of the
        collection when they are found in a prompt.

        Args:
            tiers: what counts beside verbatim texts, see `KnownTexts`.
            into: a registry to extend, say an engine's; `tiers`, `max_chars` and prefix are its own.
            max_chars: most characters that are kept.
        """
        if into is None:
            into = KnownTexts(tiers, prefix=self._contexts.prefix, max_chars=max_chars)
        with self._lock:
            self._followers.add(into, self._index.records())
        return into

    @property
    def context(self) -> Context:
        """What documents are encoded behind."""
        return self._contexts.context

    def renew_contexts(
        self, context: Context | None = None, *, progress: Progress | None = None
    ) -> RenewReport:
        """Choose anew what all documents are encoded behind, and encode those that get something else.

        Similar documents are chosen when a document is written, from those that are there then; after many
        were added, earlier ones may have better ones. Can be interrupted and repeated.

        Args:
            context: change to this; None: as it is.
            progress: called with (records done, records in all).

        Raises:
            ConfigError: an encoder that cannot do it.
            StoreWriteError: the store cannot be written.
            CorpusLocked: another process is writing.
        """
        with self._lock:
            return self._lockstep.renew(context, progress)

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
            return self._lockstep.reconcile(verify=verify, progress=progress)

    def warm(
        self,
        *,
        only_missing: bool = False,
        order: Order | None = None,
        room: Callable[[], int | None] | None = None,
        progress: Progress | None = None,
    ) -> WarmReport:
        """Build the entries that documents lack, also for a collection that somebody else has filled.

        A batch's entries are complete when the next one begins, so that an interrupted call can be repeated;
        what is there then is not built again.

        Args:
            only_missing: believe the entries that are there, and leave the collection itself as it is: no
                labels are written into its metadata. Otherwise every byte of the entries is verified first,
                and what is damaged is built anew.
            order: gives the place of a record and its tokens; the lowest come first. None: as they lie.
            room: how many bytes the store still holds, asked before every batch; None: no limit. When a
                batch does not fit, the call ends instead of evicting what it has just built.
            progress: called with (tokens read, tokens to read).

        Raises:
            StoreWriteError: the store cannot be written.
            CorpusLocked: another process is writing.
        """
        with self._lock:
            return warm(
                self._lockstep,
                self._index,
                self._store,
                self._contexts,
                only_missing=only_missing,
                order=order,
                room=room,
                progress=progress,
            )

    def stats(self) -> CorpusStats:
        """Sizes and counts."""
        return CorpusStats(
            documents=self._index.count(), uncached=self._lockstep.uncached, store=self._store.stats()
        )

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
    ) -> list[Item]:
        """Texts with ids, clean metadata and keys; everything that can be refused is refused here."""
        metadatas = [None] * len(texts) if metadatas is None else metadatas
        if not len(texts) == len(metadatas) == (len(texts) if ids is None else len(ids)):
            raise InputError("texts, ids and metadatas must be of one length")
        cleaned = [clean(metadata or {}) for metadata in metadatas]
        ids = list(map(_content_id, texts, cleaned)) if ids is None else list(ids)
        self._index.check_records(ids, texts, cleaned)
        items = []
        for record_id, text, metadata in zip(ids, texts, cleaned, strict=True):
            try:
                key = self.key_of(text)
            except InputError as error:
                raise type(error)(f"document {record_id!r}: {error}") from error
            items.append(Item(record_id, text, metadata, key))
        return items

    def _place(self, items: Sequence[Item], documents: Sequence[str | None] | None) -> Places:
        names = _documents([item.metadata for item in items], documents)
        return self._contexts.parts.place([item.id for item in items], names)

    def _found(self, ids: Sequence[str]) -> list[Record]:
        found = self._index.get(ids)
        missing = set(ids) - {record.id for record in found}
        if missing:
            raise DocumentNotFound(f"the corpus holds no document with the id {min(missing)!r}")
        return found


def _texts(items: Sequence[Item]) -> dict[str, str]:
    return {item.id: item.text for item in items}


def _documents(
    metadatas: Sequence[Metadata | None], documents: Sequence[str | None] | None
) -> list[str | None]:
    """The document of each text: as given, by default the metadata's source."""
    if documents is None:
        sources = [(metadata or {}).get("source") for metadata in metadatas]
        return [None if source is None else str(source) for source in sources]
    if len(documents) != len(metadatas):
        raise InputError("texts and documents must be of one length")
    return list(documents)


def _at(items: Sequence[Item], places: Places) -> list[Item]:
    """Items with the labels of their places."""
    labels: dict[str, dict[str, str | int]] = {
        i: {DOCUMENT_FIELD: name, PART_FIELD: number} for i, (name, number) in places.of.items()
    }
    return [replace(item, labels=labels.get(item.id, {})) for item in items]


def _content_id(text: str, metadata: Metadata) -> str:
    """96 bits of a digest of text and source."""
    fields: dict[str, str | int | bytes] = {
        "text": _raw(text),
        "source": _raw(str(metadata.get("source", ""))),
    }
    return tagged_digest(fields)[:24]


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # lone surrogates are refused later, with a clear error
