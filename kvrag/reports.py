"""What changes of a corpus did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.store.base import Receipt, StoreStats


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What `ingest` did.

    Attributes:
        ids: of all texts, in order.
        added: texts that were new.
        skipped: texts that were there already.
        completed: those among them that lacked their entry.
    """

    ids: tuple[str, ...]
    added: int
    skipped: int
    completed: int = 0


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """What `reconcile` found and mended.

    Attributes:
        records: records in the collection.
        rebuilt: entries encoded anew.
        removed: entries without a record, deleted.
        relabelled: records that named another entry than their text's.
        unreferenced: references without a record, forgotten.
        damaged: entries or files found broken and set aside or removed.
        unencodable: ids of records that this model cannot read (empty or too long).
    """

    records: int
    rebuilt: int
    removed: int
    relabelled: int
    unreferenced: int
    damaged: int
    unencodable: tuple[str, ...]

    @property
    def was_equal(self) -> bool:
        """Nothing had to be mended."""
        return not (self.rebuilt or self.removed or self.relabelled or self.unreferenced or self.damaged)


@dataclass(frozen=True, slots=True)
class RenewReport:
    """What `renew_contexts` did.

    Attributes:
        records: records in the collection.
        changed: records that are encoded behind something else than before.
        encoded: entries encoded for them.
        removed: entries that nobody refers to any more, deleted.
    """

    records: int
    changed: int
    encoded: int
    removed: int


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a deletion of documents erased, for those who have to show it.

    Attributes:
        ids: of the records that were removed.
        collection: name of the collection that they, their texts and their vectors were removed from.
        entries: receipts of the caches that were erased with them, in every place that had bytes of them;
            also of caches of other documents that were encoded behind these.
        kept: ids of caches that stay, because another document of some collection has the same text.
        seconds: when it was complete, since 1970.
    """

    ids: tuple[str, ...]
    collection: str
    entries: tuple[Receipt, ...]
    kept: tuple[str, ...]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches that were erased."""
        return sum(receipt.num_bytes for receipt in self.entries)


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What `warm` did.

    Attributes:
        records: records in the collection.
        built: caches that were built.
        known: records whose cache was there.
        unencodable: ids of records that this model cannot read (empty or too long).
        num_bytes: bytes that the store has more than before.
        is_full: it stopped because the budget is used up; more would have evicted what was just built.
    """

    records: int
    built: int
    known: int
    unencodable: tuple[str, ...]
    num_bytes: int
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Size of the corpus.

    Attributes:
        documents: records in the collection.
        uncached: texts added by this object whose entry could not be written.
        store: counts of the store, which other collections may share.
    """

    documents: int
    uncached: int
    store: StoreStats
