"""What changes of a corpus did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.store.base import StoreStats


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
