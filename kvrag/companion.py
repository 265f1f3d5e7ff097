"""Caches that accompany a collection which somebody else writes, such as a framework's vector store.

`kvrag.corpus.Corpus` writes collection and store itself. Where the collection is written by other code, that
code calls a companion around each of its writes, in the order that leaves, after a crash, at worst something
that `reconcile` mends:

| add, upsert, update | `hold` (reference, entry) -> collection -> `collect` (entries nobody refers to) |
| delete              | collection -> `drop` (reference, entries nobody refers to)                      |

Where the collection is locked for a change, nobody should wait for the model: `prepared` builds before it is
locked, `refer` says meanwhile who refers to what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from kvrag.errors import ConfigError, InputError, StoreWriteError
from kvrag.items import Encoder
from kvrag.lockstep import Progress, batches
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey
from kvrag.store.references import References

logger = logging.getLogger(__name__)

Record = tuple[str, str]
"""A record's id and text."""


@dataclass(frozen=True, slots=True)
class CompanionReport:
    """What a reconciliation found.

    Attributes:
        records: in the collection.
        built: entries that were missing.
        removed: entries that nobody referred to.
        unencodable: ids of records without a cache: empty, or longer than the model reads.
    """

    records: int
    built: int
    removed: int
    unencodable: tuple[str, ...]


class Companion:
    """Keeps an entry for each record of one collection; may be used from any thread.

    Documents that cannot have a cache are kept out of it and read anew when they are asked for: the
    collection is not ours to refuse them. So it is if the store cannot be written, which is said once.
    """

    def __init__(
        self,
        owner: str,
        store: KVStore,
        encoder: Encoder,
        *,
        references: References | None = None,
        batch_size: int = 32,
    ) -> None:
        """Accompany a collection.

        Args:
            owner: the collection's own id, which no other collection has or will have.
            store: where entries are kept; collections may share it.
            encoder: reads the texts.
            references: who refers to which entry; None: a file in the store's folder, or in memory.
            batch_size: documents that are encoded and written together.

        Raises:
            ConfigError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        path = getattr(store, "path", None)
        self._file = None if path is None else Path(path) / "references.sqlite"
        self.owner, self.batch_size = owner, batch_size
        self._store, self._encoder = store, encoder
        self._references = references or References(self._file)
        self._has_warned = False

    def key_of(self, text: str) -> EntryKey | None:
        """The name of a text's entry; None if it cannot have one."""
        tokens = self._encoder.tokenize(text)
        if not 0 < len(tokens) <= self._encoder.max_tokens:
            return None
        return EntryKey(self._encoder.fingerprint, tokens)

    def has(self, text: str) -> bool:
        """Whether the store has an entry for a text."""
        key = self.key_of(text)
        return key is not None and key in self._store

    def hold(self, texts: Mapping[str, str], progress: Progress | None = None) -> list[str]:
        """Build entries for records that are about to be written.

        Args:
            texts: by record id.
            progress: called after every batch.

        Returns:
            Entries that the records refer to no more; for `collect`, once the collection is written.
        """
        freed: list[str] = []
        done = 0
        for batch in batches(list(texts.items()), self.batch_size):
            freed += self._trying(partial(self._hold, batch)) or []
            done += len(batch)
            if progress is not None:
                progress(done, len(texts))
        return freed

    @contextmanager
    def prepared(self, texts: Iterable[str]) -> Iterator[None]:
        """Texts have entries until the block ends; what nobody refers to by then is removed."""
        mark = uuid4().hex  # no record has such a name; after a crash, `reconcile` finds it to be nobody's
        names = {f"prepared {mark} {n}": text for n, text in enumerate(texts)}
        try:
            self.hold(names)
            yield
        finally:
            self.drop(names)

    def refer(self, texts: Mapping[str, str]) -> list[str]:
        """As `hold`, without building: for entries that are there, or will be when they are first used."""
        return self._trying(lambda: self._refer(self._keys(texts.items()), texts)) or []

    def collect(self, freed: Sequence[str]) -> list[str]:
        """Remove those of these entries that nobody refers to; the ids of what was removed."""
        if not freed:
            return []
        return self._trying(lambda: self._references.collect(freed, self._store.delete)) or []

    def drop(self, ids: Iterable[str]) -> list[str]:
        """Records are gone from the collection: their entries go unless others refer to them."""
        ids = list(ids)
        return self.collect(self._trying(lambda: self._references.remove(self.owner, ids)) or [])

    def drop_all(self) -> list[str]:
        """The collection is gone."""
        return self.drop(self._references.of(self.owner))

    def reconcile(
        self, records: Iterable[Record], *, total: int, progress: Progress | None = None
    ) -> CompanionReport:
        """Make the store what the collection says; what is there already is not built again.

        Can be interrupted and repeated.

        Args:
            records: all of the collection's.
            total: how many that are, for `progress`.
            progress: called after every batch.
        """
        known: set[str] = set()
        unencodable: list[str] = []
        freed: list[str] = []
        built = 0
        for batch in _in_batches(records, self.batch_size):
            unencodable += [i for i, text in batch if self.key_of(text) is None]
            built += len({key for _, text in batch if (key := self.key_of(text)) and key not in self._store})
            freed += self._trying(partial(self._hold, batch)) or []
            known.update(i for i, _ in batch)
            if progress is not None:
                progress(len(known), total)
        stale = [record for record in self._references.of(self.owner) if record not in known]
        removed = [*self.collect(freed), *self.drop(stale)]
        return CompanionReport(len(known), built, len(removed), tuple(unencodable))

    def close(self) -> None:
        """Close the file of references; the store stays open."""
        self._references.close()

    def _hold(self, records: Sequence[Record]) -> list[str]:
        keys = self._keys(records)
        freed = self._refer(keys, [i for i, _ in records])
        missing = list({key.id: key for key in keys.values() if key not in self._store}.values())
        rows = self._encoder.encode([key.tokens for key in missing]) if missing else []
        for key, kv in zip(missing, rows, strict=True):
            self._store.put(key, kv)
        return freed

    def _keys(self, records: Iterable[Record]) -> dict[str, EntryKey]:
        return {i: key for i, text in records if (key := self.key_of(text)) is not None}

    def _refer(self, keys: Mapping[str, EntryKey], ids: Iterable[str]) -> list[str]:
        without = [i for i in ids if i not in keys]
        freed = self._references.remove(self.owner, without) if without else []
        return freed + self._references.add(self.owner, {i: key.id for i, key in keys.items()})

    def _trying(self, work: Callable[[], list[str]]) -> list[str] | None:
        """What the store refuses is said, once, and is no reason to refuse the documents."""
        try:
            return work()
        except (StoreWriteError, InputError) as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("documents are kept without caches and read anew when asked for: %s", error)
            return None


def _in_batches(records: Iterable[Record], size: int) -> Iterable[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
