"""What chats have said, for good: spans in Chroma and their rows in the store, in lockstep."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvrag.archive.records import Archived, Names
from kvrag.archive.sealing import RecordSeal
from kvrag.archive.span import Span
from kvrag.chroma_rows import Record
from kvrag.collection import Embedding
from kvrag.errors import CorpusLocked, InputError, StoreWriteError
from kvrag.index import Index
from kvrag.items import KEY_FIELD
from kvrag.reports import Deletion
from kvrag.segments import KV
from kvrag.store.base import KVStore, Receipt
from kvrag.store.damage import Damaged
from kvrag.store.key import Fingerprint
from kvrag.store.references import References
from kvrag.store.several import get_many, put_many
from kvrag.stores import key_of

logger = logging.getLogger(__name__)

COLLECTION = "kvrag-archive"
_FEWEST, _MOST = 16, 4096  # records asked for in the first and in the last look
_RETRY_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """What `Archive.reconcile` found and mended.

    Attributes:
        records: spans in the collection.
        stale: references without a record, forgotten.
        unreferenced: records whose reference was lacking.
        removed: entries of the store that nobody refers to, deleted.
        missing: records whose entry is not in the store; they are read anew when they are asked for.
    """

    records: int
    stale: int
    unreferenced: int
    removed: int
    missing: int


class Archive:
    """Spans of chats that a memory may lose, found by what they say.

    Every change goes in the order in which a corpus does it, so that a crash leaves at worst an entry that
    nobody finds, which `delete` and `reconcile` remove:

    | add    | reference -> entry -> Chroma -> entries nobody refers to any more |
    | delete | Chroma -> reference -> entries nobody refers to any more          |

    Entries are ordinary ones of the store: budgets, times to live, pins, encryption and `verify` are for them
    as well. One that was evicted, has expired or is damaged is a miss, counted in `counts`; its text and
    tokens are still there, and whoever wants it reads it anew (`kvrag.archive.recall`). What cannot be
    written to the store is kept as text alone; what Chroma cannot take because another process is writing is
    kept in memory and tried again with every later call.

    Where the store is encrypted, so are texts, tokens and the ids of chats, with the same key.

    Any number of processes may use one archive; each takes Chroma's lock for the moment of a change only.
    Any thread may call it.

    Attributes:
        counts: what has happened so far: spans "added", those "without entry", "waiting" for Chroma;
            "hits" and "misses" of entries; "damaged" records, which are left out.
    """

    def __init__(
        self,
        index: Index,
        store: KVStore,
        fingerprint: Fingerprint,
        *,
        references: References | None = None,
        ttl_seconds: float | None = None,
        wait_seconds: float = 5.0,
        closes_store: bool = False,
    ) -> None:
        """Work on a collection that is the archive's alone.

        Args:
            index: the collection; closed with the archive.
            store: where rows are kept.
            fingerprint: what entries depend on beside their place: model, codec, tenant.
            references: who refers to which entry; None: a file in the store's folder, or for a store without
                a `path`, in memory.
            ttl_seconds: time to live of entries; None: the store's.
            wait_seconds: how long another process's change is waited for.
            closes_store: close the store with the archive.

        Raises:
            ConfigError: the store is encrypted and the archive is not, or the other way round, or with
                another key.
        """
        self._index, self._store = index, store
        self._names = Names(fingerprint, index.id)
        self._seal = RecordSeal(key_of(store), fingerprint.tenant)
        if (one := index.first()) is not None:
            self._seal.check(one.metadata)
        self._references = references or References.beside(store)
        self._ttl_seconds, self._wait_seconds = ttl_seconds, wait_seconds
        self._closes_store = closes_store
        self._lock = threading.RLock()
        self._waiting: dict[str, tuple[str, dict[str, Any]]] = {}
        self._has_warned = False
        self.counts: Counter[str] = Counter()

    @staticmethod
    def open(
        path_or_url: str | Path,
        store: KVStore,
        fingerprint: Fingerprint,
        *,
        collection: str = COLLECTION,
        embedding: Embedding | None = None,
        ttl_seconds: float | None = None,
        wait_seconds: float = 5.0,
    ) -> Archive:
        """Open an archive, which is created if there is none; see `Index.open` and the class for arguments.

        Raises:
            ConfigError: the collection was made with another embedding, or with one that is not known here;
                or another key.
            CorpusError: the database cannot be opened.
            CorpusLocked: the collection has to be created while another process is writing.
        """
        index = Index.open(path_or_url, collection, embedding=embedding)
        try:
            return Archive(index, store, fingerprint, ttl_seconds=ttl_seconds, wait_seconds=wait_seconds)
        except BaseException:
            index.close()
            raise

    @property
    def index(self) -> Index:
        """The collection."""
        return self._index

    def add(self, session: str, spans: Sequence[Span]) -> None:
        """Keep spans of a chat; those that begin where one is kept already replace it.

        Args:
            session: the chat's id.
            spans: finished ones.

        Raises:
            InputError: an id that cannot be kept.
        """
        self._names.chat(session)
        kept = [Archived.of(session, span) for span in spans]
        keys = [self._names.key(span) for span in kept]
        ids = [self._names.record(session, span.start) for span in kept]
        if not ids:
            return
        self._index.check_records(ids, [span.text for span in kept], [{"session": session}] * len(ids))
        with self._lock:
            freed: list[str] = []
            try:
                freed = self._references.add(
                    self._index.id, {i: key.id for i, key in zip(ids, keys, strict=True)}
                )
                entries = [(key, span.kv) for key, span in zip(keys, spans, strict=True)]
                costs = [span.cost_seconds for span in spans]
                put_many(self._store, entries, cost_seconds=costs, ttl_seconds=self._ttl_seconds)
            except StoreWriteError as error:
                self.counts["without entry"] += sum(key not in self._store for key in keys)
                self._warn("spans of chats are kept as text and read anew when they are needed: %s", error)
            self.counts["added"] += len(ids)
            rows = zip(ids, kept, keys, strict=True)
            self._waiting |= {i: (span.text, span.metadata(key.id)) for i, span, key in rows}
            self._write_waiting(self._wait_seconds)
            self._collect(freed)

    def search(
        self,
        session: str,
        text: str,
        k: int,
        *,
        before: int | None = None,
        is_wanted: Callable[[Archived], bool] | None = None,
    ) -> list[Archived]:
        """The spans of a chat that are nearest to a text, nearest first.

        Args:
            session: the chat's id.
            text: usually what the user says.
            k: how many at most.
            before: only spans that end at this place of the chat or before it; None: all.
            is_wanted: says no to those that are not looked for, because the memory holds them, say.

        Raises:
            InputError: k is below 1, or an id that cannot be kept.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1")
        self._names.chat(session)
        with self._lock:
            self._write_waiting(0.0)
        where = self._of(session, {"end": {"$lte": before}} if before is not None else None)
        number = max(k, _FEWEST)
        while True:
            hits = self._index.search(text, number, where=where)
            found = [
                span for hit in hits if (span := self._read(hit.id, hit.text, hit.metadata, hit.similarity))
            ]
            wanted = [span for span in found if is_wanted is None or is_wanted(span)]
            if len(wanted) >= k or len(hits) < number or number >= _MOST:
                return wanted[:k]
            number *= 4

    def load(self, spans: Sequence[Archived]) -> list[KV | None]:
        """The rows of spans, in order; None: they are not in the store any more, or not whole."""
        keys = [self._names.key(span) for span in spans]
        found = get_many(self._store, keys)
        rows = [found.get(key.id) for key in keys]
        with self._lock:
            self.counts["hits"] += sum(kv is not None for kv in rows)
            self.counts["misses"] += sum(kv is None for kv in rows)
        return rows

    def delete(self, session: str, *, start: int = 0, forget: bool | None = None) -> Deletion:
        """Remove a chat's spans, their texts, vectors and entries, or those from a place of the chat on.

        An entry that a copy of the chat refers to stays until that is deleted, too.

        Args:
            session: the chat's id; none of its spans need be there.
            start: spans that end behind this place go.
            forget: overwrite the texts in an embedded Chroma's file, too, which takes as long as copying it;
                None: if the whole chat is deleted.

        Returns:
            What was erased, in every tier of the store.

        Raises:
            CorpusLocked: another process is writing; nothing was removed.
            StoreWriteError: gone from the collection, but the store cannot be written; `reconcile` later.
        """
        prefix = self._names.chat(session)
        with self._lock, self._writing(self._wait_seconds):
            records = self._index.matching(self._of(session, {"end": {"$gt": start}}))
            gone = {record.id for record in records}
            # Also what a crash has left between the store and Chroma.
            named = self._named(prefix)
            gone |= {i for i in (*named, *self._waiting) if self._is_behind(i, prefix, start)}
            told = {str(record.metadata.get(KEY_FIELD, "")) for record in records}
            told |= {key for i, key in named.items() if i in gone}
            for i in gone:
                self._waiting.pop(i, None)
            self._index.delete(sorted(gone))
            receipts = self._let_go(gone, told)
            if (start == 0 if forget is None else forget) and gone:
                self._index.forget()
        kept = sorted(key for key in told if key and self._references.count(key))
        return Deletion(tuple(sorted(gone)), self._index.name, tuple(receipts), tuple(kept), time.time())

    def fork(
        self,
        session: str,
        copy: str,
        *,
        end: int | None = None,
        is_wanted: Callable[[Archived], bool] | None = None,
    ) -> int:
        """Give a copy of a chat the spans that the chat has; how many.

        Records are copied, entries are shared: they stay until the last chat that has them is deleted.

        Args:
            session: the chat's id.
            copy: the id of the other; spans that it has at the same places are replaced.
            end: spans that end behind this place are left out; None: all are copied.
            is_wanted: says no to those that are left out, too.

        Raises:
            CorpusLocked: another process is writing.
            StoreWriteError: the references cannot be written; nothing was copied.
        """
        with self._lock, self._writing(self._wait_seconds):
            self._write_all()
            where = self._of(session, {"end": {"$lte": end}} if end is not None else None)
            pairs = [
                (record, span, vector)
                for record, vector in self._index.records_with_vectors(where)
                if (span := self._read(record.id, record.text, record.metadata))
                and (is_wanted is None or is_wanted(span))
            ]
            named = self._references.named(self._index.id, [record.id for record, _, _ in pairs])
            labels = [named.get(r.id, str(r.metadata[KEY_FIELD])) for r, _, _ in pairs]
            ids = [self._names.record(copy, span.start) for _, span, _ in pairs]
            freed = self._references.add(self._index.id, dict(zip(ids, labels, strict=True)))
            copies = [
                self._record(i, span.text, span.moved(copy).metadata(label))
                for i, label, (_, span, _) in zip(ids, labels, pairs, strict=True)
            ]
            self._index.add_with_vectors(copies, [vector for _, _, vector in pairs])
            self._collect(freed)
            return len(copies)

    def spans(self, session: str) -> list[Archived]:
        """All spans of a chat, in order."""
        read = (self._read(r.id, r.text, r.metadata) for r in self._index.matching(self._of(session)))
        return sorted((span for span in read if span), key=lambda span: span.start)

    def sessions(self) -> dict[str, int]:
        """The chats that have spans here, and how many each."""
        read = (self._read(r.id, r.text, r.metadata) for r in self._index.records())
        return dict(Counter(span.session for span in read if span))

    def reconcile(self) -> ArchiveReport:
        """Make references and entries what the collection says, after a crash.

        Raises:
            StoreWriteError: the references or the store cannot be written.
        """
        with self._lock:
            owner, named = self._index.id, self._references.of(self._index.id)
            labels = {r.id: str(r.metadata.get(KEY_FIELD, "")) for r in self._index.records()}
            lacking = {i: key for i, key in labels.items() if i not in named}
            self._references.add(owner, lacking)
            stale = [i for i in named if i not in labels and i not in self._waiting]
            self._references.remove(owner, stale)
            removed = self._references.collect(self._store.ids(), self._store.delete)
            missing = sum(named.get(i, key) not in self._store for i, key in labels.items())
            return ArchiveReport(len(labels), len(stale), len(lacking), len(removed), missing)

    def close(self) -> None:
        """Close collection and references; what waits for Chroma is tried once more."""
        with self._lock:
            self._write_waiting(self._wait_seconds)
            if self._waiting:
                logger.warning("%d spans of chats could not be written to Chroma", len(self._waiting))
            self._index.close()
            self._references.close()
            if self._closes_store:
                self._store.close()

    def __enter__(self) -> Archive:
        """The archive itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _write_waiting(self, wait_seconds: float) -> None:
        """Bring into Chroma what it lacks; if another process is writing, later."""
        if not self._waiting:
            return
        try:
            with self._writing(wait_seconds):
                self._write_all()
        except CorpusLocked as error:
            self._warn("spans of chats wait to be written: %s", error)
        self.counts["waiting"] = len(self._waiting)

    def _write_all(self) -> None:
        if self._waiting:
            texts = [text for text, _ in self._waiting.values()]
            records = [self._record(i, text, metadata) for i, (text, metadata) in self._waiting.items()]
            # Not by Chroma: it would make vectors of what is encrypted.
            self._index.add_with_vectors(records, self._index.embed(texts))
            self._waiting.clear()

    @contextmanager
    def _writing(self, wait_seconds: float) -> Iterator[None]:
        """With the writers' lock, which other processes have for moments only, as a rule.

        Raises:
            CorpusLocked: another process has it for longer.
        """
        end = time.monotonic() + wait_seconds
        while True:
            try:
                self._index.begin_writing()
                break
            except CorpusLocked:
                if time.monotonic() >= end:
                    raise
                time.sleep(_RETRY_SECONDS)
        try:
            yield
        finally:
            self._index.end_writing()

    def _named(self, prefix: str) -> dict[str, str]:
        named = self._references.of(self._index.id)
        return {i: key for i, key in named.items() if i.startswith(prefix)}

    def _is_behind(self, record_id: str, prefix: str, start: int) -> bool:
        return record_id.startswith(prefix) and self._names.start(record_id) >= start

    def _let_go(self, ids: set[str] | Sequence[str], told: set[str]) -> list[Receipt]:
        """Forget references, and delete of what they and `told` name what nobody refers to any more."""
        receipts: list[Receipt] = []

        def erase(key_id: str) -> Receipt:
            receipts.append(self._store.delete(key_id))
            return receipts[-1]

        freed = self._references.remove(self._index.id, ids)
        self._references.collect([*freed, *sorted(told - {""})], erase)
        return [receipt for receipt in receipts if receipt.erased]

    def _collect(self, freed: Sequence[str]) -> None:
        if freed:
            with suppress(StoreWriteError):  # they are nobody's; `kvrag gc` finds them
                self._references.collect(freed, self._store.delete)

    def _record(self, record_id: str, text: str, metadata: Mapping[str, Any]) -> Record:
        digest = self._names.chat(str(metadata["session"]))
        return Record(record_id, *self._seal.shut(record_id, text, metadata, digest=digest))

    def _read(
        self, record_id: str, text: str, metadata: Mapping[str, Any], similarity: float = 0.0
    ) -> Archived | None:
        """A record, if it is one of this tenant's and as it was written."""
        if self._seal.is_foreign(metadata):
            return None
        try:
            found = Archived.read(*self._seal.open(record_id, text, metadata), similarity)
        except (Damaged, InputError) as error:
            self.counts["damaged"] += 1
            self._warn("records of the archive are left out: %s", error)
            return None
        return found if record_id == self._names.record(found.session, found.start) else None

    def _of(self, session: str, also: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A filter for the records of a chat."""
        own = {"session": self._seal.session(session, self._names.chat(session))}
        return own if also is None else {"$and": [own, dict(also)]}

    def _warn(self, message: str, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(message, error)
