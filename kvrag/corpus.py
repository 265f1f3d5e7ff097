"""Index and store in lockstep: what the Chroma collection holds has its prebuilt cache, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvrag.errors import (
    ConfigError,
    DocumentNotFound,
    DuplicateDocument,
    InputError,
)
from kvrag.index import Hit, Index, Metadata, Record, already_there
from kvrag.lockstep import Lockstep, Progress, batches
from kvrag.neighbours import KEY_FIELD, Encoder, Item, Neighbourhoods, clean
from kvrag.reports import CorpusStats, Deletion, IngestReport, ReconcileReport, RenewReport, WarmReport
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey, tagged_digest
from kvrag.store.references import References

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


Order = Callable[[str, int], Any]
"""The place of a document among those to be read first, from its text and its number of tokens."""


class Corpus:
    """Documents that are found by Chroma and answered from the store.

    Every change goes in this order, batch by batch, so that a crash leaves at worst something that
    `reconcile` mends, and never a reference to the wrong rows:

    | add, upsert, update | reference -> entry -> Chroma -> entries nobody refers to any more |
    | delete              | Chroma -> reference -> entries nobody refers to any more          |

    (The reference comes first, so that nobody who shares the store takes the entry for an orphan.)
    Not even `reconcile` is needed for right answers: a record without entry is read anew.

    With `neighbours`, each document's entry is encoded behind its most similar documents (see
    `kvrag.neighbours`), which Chroma finds only among what it has already, so that changes go

    | add, upsert, update | Chroma -> entries that tell of replaced texts -> reference -> entry -> label |
    | delete              | Chroma -> reference -> entries -> the same for documents left behind          |

    where the label is metadata that names entry and neighbours; a record without is one to `reconcile`.

    Args:
        index: the collection.
        store: where entries are kept; several collections may share it.
        encoder: reads the texts.
        references: who refers to which entry; None: a file in the store's folder, or for a store without
            a `path`, in memory.
        batch_size: documents per batch; a batch is encoded and written as a whole.
        neighbours: encode each document behind so many others, for a policy with as many `neighbours`;
            None: as the collection was built, a new one with none. A collection that was built without is
            extended with; `renew_neighbours` then gives them to documents that are there already.

    Raises:
        ConfigError: the collection was built with another number of neighbours, or an impossible argument.
    """

    def __init__(
        self,
        index: Index,
        store: KVStore,
        encoder: Encoder,
        *,
        references: References | None = None,
        batch_size: int = 32,
        neighbours: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self._index = index
        self._store = store
        self._near = Neighbourhoods(index, encoder, neighbours)
        self._references = references or References(_references_file(store))
        self._lockstep = Lockstep(index, store, encoder, self._near, self._references, batch_size)
        self._lock = threading.RLock()

    def key_of(self, text: str) -> EntryKey:
        """The key under which the store keeps this text, encoded behind the prefix alone.

        Raises:
            EmptyDocument: no token.
            DocumentTooLong: more tokens than the model reads.
        """
        return self._near.key_of(text)

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
            self._lockstep.write(items, self._index.add, progress)
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
            self._lockstep.write(items, self._index.add, progress)
            self._lockstep.settle_unlabelled([i for i in ids if i in there])
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
            self._lockstep.write(items, self._index.upsert, progress)
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
            self._lockstep.write(self._items(texts, ids, merged), self._index.upsert, None)

    def delete(self, ids: Sequence[str]) -> Deletion:
        """Remove documents; the bytes of entries that no document of any collection refers to go with them.

        So do entries of other documents that were encoded behind them; those are built anew, behind others.

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
            behind = self._near.behind(ids)
            # Also the entries that records name: a reference may have been lost.
            told = self._near.entries([*records, *behind])
            named = self._references.named(self._index.id, ids)
            self._index.delete(ids)
            receipts = self._lockstep.let_go([*ids, *(record.id for record in behind)], told)
            if self._near.can_encode:
                self._lockstep.settle([record.id for record in behind])
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
        return [Hit(h.id, h.text, clean(h.metadata), h.distance) for h in hits]

    def documents(self) -> Iterator[Record]:
        """All documents, in no particular order."""
        for record in self._index.records():
            yield Record(record.id, record.text, clean(record.metadata))

    def neighbours(self, ids: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """For documents by id, the texts that they are encoded behind, most similar first.

        Ids that are not there are left out; all of them in a corpus without neighbours.
        """
        return self._near.texts(ids)

    @property
    def num_neighbours(self) -> int:
        """Behind how many others each document is encoded."""
        return self._near.count

    def renew_neighbours(self, count: int | None = None, *, progress: Progress | None = None) -> RenewReport:
        """Choose the neighbours of all documents anew, and encode those that get others.

        Neighbours are chosen when a document is written, from those that are there then; after many were
        added, earlier ones may have better ones. Can be interrupted and repeated.

        Args:
            count: change to so many neighbours; 0: to none.
            progress: called with (records done, records in all).

        Raises:
            ConfigError: an impossible number, or an encoder that cannot do it.
            StoreWriteError: the store cannot be written.
            CorpusLocked: another process is writing.
        """
        with self._lock:
            self._index.begin_writing()
            before = self._near.count
            count = before if count is None else count
            if count:
                self._near.require_encoder()
            # While some have more and some fewer, deletions have to look for both.
            self._near.note(max(before, count))
            records = list(self._index.records())
            done = changed = encoded = removed = 0
            for batch in batches(records, self._lockstep.batch_size):
                items = [item for item in self._near.items(batch, [], anew=count) if item.relabelling]
                ids = {item.id for item in items}
                told = self._near.entries([record for record in batch if record.id in ids])
                freed = self._references.add(self._index.id, {item.id: item.key.id for item in items})
                encoded += self._lockstep.encode_missing(items)
                changed += self._lockstep.relabel(items)
                removed += len(self._references.collect([*freed, *told], self._store.delete))
                done += len(batch)
                if progress is not None:
                    progress(done, len(records))
            self._near.note(count)
            return RenewReport(records=len(records), changed=changed, encoded=encoded, removed=removed)

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
            self._lockstep.prepare_neighbours()
            total, owner = self._index.count(), self._index.id
            wanted: dict[str, str] = {}
            unencodable: list[str] = []
            rebuilt = relabelled = 0
            freed: list[str] = []
            for batch in batches(list(self._index.records()), self._lockstep.batch_size):
                items = self._near.items(batch, unencodable)
                wanted.update((item.id, item.key.id) for item in items)
                freed += self._references.add(owner, {item.id: item.key.id for item in items})
                rebuilt += self._lockstep.encode_missing(items)
                relabelled += self._lockstep.relabel(items)
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
            if not only_missing:
                self._index.begin_writing()
                self._store.check(fix=True)
                self._lockstep.prepare_neighbours()
            before = self._store.stats().num_bytes
            unencodable: list[str] = []
            missing: list[tuple[Any, int, str]] = []  # place, number of tokens, id
            records = tokens = built = 0
            is_full = False
            for batch in batches(list(self._index.records()), self._lockstep.batch_size):
                items = self._near.items(batch, unencodable)
                records += len(batch)
                for item in items:
                    if item.key not in self._store:
                        place = 0 if order is None else order(item.text, len(item.key.tokens))
                        missing.append((place, len(item.key.tokens), item.id))
                self._warm([item for item in items if item.key in self._store], only_missing=only_missing)
            missing.sort(key=lambda row: row[0])
            total = sum(length for _, length, _ in missing)
            for rows in batches(missing, self._lockstep.batch_size):
                if room is not None and not _fits(
                    room(), rows, self._store.stats().num_bytes - before, tokens
                ):
                    is_full = True
                    break
                items = self._near.items(self._index.get([record for _, _, record in rows]), [])
                built += self._warm(items, only_missing=only_missing)
                tokens += sum(length for _, length, _ in rows)
                if progress is not None:
                    progress(tokens, total)
            return WarmReport(
                records=records,
                built=built,
                known=records - len(missing) - len(unencodable),
                unencodable=tuple(unencodable),
                num_bytes=self._store.stats().num_bytes - before,
                is_full=is_full,
            )

    def _warm(self, items: Sequence[Item], *, only_missing: bool) -> int:
        """References, entries and labels of some records; how many entries were built."""
        freed = self._references.add(self._index.id, {item.id: item.key.id for item in items})
        built = self._lockstep.encode_missing(items)
        if not only_missing:
            self._lockstep.relabel(items)
        self._references.collect(freed, self._store.delete)
        return built

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

    def _found(self, ids: Sequence[str]) -> list[Record]:
        found = self._index.get(ids)
        missing = set(ids) - {record.id for record in found}
        if missing:
            raise DocumentNotFound(f"the corpus holds no document with the id {min(missing)!r}")
        return found


def _fits(room: int | None, rows: Sequence[tuple[Any, int, str]], num_bytes: int, num_tokens: int) -> bool:
    """Whether a batch fits into the room, by what a token took so far; the first one is always tried."""
    if room is None or not num_tokens:
        return room is None or room > 0
    return sum(length for _, length, _ in rows) * num_bytes / num_tokens <= room


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
