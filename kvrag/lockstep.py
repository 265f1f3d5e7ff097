"""Writing documents so that collection, references and store agree, whenever a crash comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from kvrag.config import ALONE, Context
from kvrag.contexts import Contexts
from kvrag.errors import StoreWriteError
from kvrag.index import Index, Metadata
from kvrag.items import KEY_FIELD, Encoder, Item
from kvrag.parts import DOCUMENT_FIELD, PART_FIELD
from kvrag.reports import ReconcileReport, RenewReport
from kvrag.store.base import KVStore, Receipt
from kvrag.store.references import References
from kvrag.store.several import put_many

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (documents done, documents in all) after every batch."""

IntoIndex = Callable[[Sequence[str], Sequence[str], Sequence[Metadata]], None]
"""A way of a collection to take ids, texts and metadata."""


class Lockstep:
    """The steps of a corpus's writes; `kvrag.corpus.Corpus` says in which order and why.

    Attributes:
        batch_size: documents per batch; a batch is encoded and written as a whole.
        uncached: documents of this object's writes whose entries could not be stored.
    """

    def __init__(
        self,
        index: Index,
        store: KVStore,
        encoder: Encoder,
        contexts: Contexts,
        references: References,
        batch_size: int,
    ) -> None:
        """Work on the parts of one corpus, under its lock."""
        self._index, self._store, self._encoder = index, store, encoder
        self._contexts, self._references, self.batch_size = contexts, references, batch_size
        self._has_warned = False
        self.uncached = 0

    def write(
        self,
        items: list[Item],
        into_index: IntoIndex,
        progress: Progress | None = None,
        *,
        moved: Mapping[str, tuple[str, int]] | None = None,
        gone: Sequence[str] = (),
    ) -> None:
        """Bring documents into collection and store.

        Args:
            items: in order.
            into_index: the collection's way of taking them.
            progress: told after every batch.
            moved: new places of parts that are there already, document and number.
            gone: ids of records that these replace; removed.
        """
        self._index.begin_writing()
        if self._contexts.context != ALONE:
            self._write_behind(items, into_index, progress, moved or {}, gone)
            return
        done, can_store = 0, True
        for batch in batches(items, self.batch_size):
            freed, can_store = self._prepare(batch, can_store=can_store)
            into_index(
                [item.id for item in batch],
                [item.text for item in batch],
                [{**item.metadata, **item.labels, KEY_FIELD: item.key.id} for item in batch],
            )
            if freed:
                self._references.collect(freed, self._store.delete)
            done += len(batch)
            if progress is not None:
                progress(done, len(items))
        self._move(moved or {})
        if gone:
            told = self._contexts.entries(self._index.get(gone))
            self._index.delete(gone)
            self.let_go(gone, told)

    def _write_behind(
        self,
        items: list[Item],
        into_index: IntoIndex,
        progress: Progress | None,
        moved: Mapping[str, tuple[str, int]],
        gone: Sequence[str],
    ) -> None:
        """The same where documents are encoded behind others, which have to be in Chroma to be found."""
        self.prepare_contexts()
        texts = {item.id: item.text for item in items}
        before = self._index.get(list(texts))
        leaving = self._index.get(gone)
        replaced = [*leaving, *(record for record in before if record.text != texts[record.id])]
        stale = {record.id: record for record in [*replaced, *self._contexts.telling(replaced)]}
        told = self._contexts.entries(list(stale.values()))
        left = self._contexts.entries([record for record in before if record.id not in stale])
        # Those behind them in the documents that they leave, and in those that they come to.
        behind = self._contexts.following([*leaving, *before, *self._index.get(list(moved))])
        into_index(list(texts), list(texts.values()), [{**i.metadata, **i.labels} for i in items])
        self._move(moved)
        if gone:
            self._index.delete(gone)
        # Who removes documents has to know if their bytes stay; who replaces some may go on without caches.
        with nullcontext() if gone else self._warning():
            self.let_go(list(stale), told)
        behind += self._contexts.following(self._index.get([*texts, *moved]))
        affected = dict.fromkeys([*texts, *stale, *moved, *behind])
        self.settle([i for i in affected if i not in set(gone)], progress)
        with self._warning():
            self._references.collect(left, self._store.delete)

    def _move(self, moved: Mapping[str, tuple[str, int]]) -> None:
        """Give parts other places."""
        if moved:
            labels = [{DOCUMENT_FIELD: document, PART_FIELD: number} for document, number in moved.values()]
            self._index.update_metadata(list(moved), labels)

    def prepare_contexts(self) -> None:
        """Before anything is encoded behind others: the collection is to know."""
        if self._contexts.context != ALONE:
            self._contexts.require_encoder()
            self._contexts.note()

    def let_go(self, ids: Sequence[str], told: Sequence[str]) -> list[Receipt]:
        """Forget what these records refer to, and delete of that, and of `told`, what nobody refers to.

        Returns:
            What was erased.
        """
        receipts: list[Receipt] = []

        def erase(key_id: str) -> Receipt:
            receipts.append(self._store.delete(key_id))
            return receipts[-1]

        freed = self._references.remove(self._index.id, ids)
        self._references.collect([*freed, *told], erase)
        return [receipt for receipt in receipts if receipt.erased]

    def complete(self, ids: Sequence[str], progress: Progress | None = None, *, refill: bool = True) -> int:
        """Build entries that records of the collection lack, or that they call otherwise; how many did.

        Those are records of an interrupted call, or of another model.
        """
        lacking: list[str] = []
        for records in self._contexts.batches(self._index.get(list(dict.fromkeys(ids))), self.batch_size):
            items = self._contexts.items(records, [])
            lacking += [
                item.id for item in items if item.relabelling or (refill and item.key not in self._store)
            ]
        self._build(lacking, progress, anew=False)
        return len(lacking)

    def settle(self, ids: Sequence[str], progress: Progress | None = None) -> None:
        """Choose what records of the collection are encoded behind, and build their entries."""
        self._build(ids, progress, anew=True)

    def _build(self, ids: Sequence[str], progress: Progress | None, *, anew: bool) -> None:
        if not ids:
            return
        rule, can_store, done = self._contexts.context if anew else None, True, 0
        for records in self._contexts.batches(self._index.get(ids), self.batch_size):
            items = self._contexts.items(records, [], anew=rule)
            freed, can_store = self._prepare(items, can_store=can_store)
            self.relabel(items)
            if freed:
                self._references.collect(freed, self._store.delete)
            done += len(records)
            if progress is not None:
                progress(done, len(ids))

    def renew(self, context: Context | None, progress: Progress | None) -> RenewReport:
        """Choose anew what all records are encoded behind; see `Corpus.renew_contexts`."""
        self._index.begin_writing()
        context = self._contexts.context if context is None else context
        if context != ALONE:
            self._contexts.require_encoder()
            # First of all: deletions look for documents behind others only where there may be some.
            self._contexts.note(context)
        records = list(self._index.records())
        done = changed = encoded = removed = 0
        for batch in self._contexts.batches(records, self.batch_size):
            items = [item for item in self._contexts.items(batch, [], anew=context) if item.relabelling]
            ids = {item.id for item in items}
            told = self._contexts.entries([record for record in batch if record.id in ids])
            freed = self._references.add(self._index.id, {item.id: item.key.id for item in items})
            encoded += self.encode_missing(items)
            changed += self.relabel(items)
            removed += len(self._references.collect([*freed, *told], self._store.delete))
            done += len(batch)
            if progress is not None:
                progress(done, len(records))
        self._contexts.note(context)
        return RenewReport(records=len(records), changed=changed, encoded=encoded, removed=removed)

    def reconcile(self, *, verify: bool, progress: Progress | None) -> ReconcileReport:
        """Make store and references what the collection says; see `Corpus.reconcile`."""
        check = self._store.check(fix=True) if verify else None
        self.prepare_contexts()
        total, owner = self._index.count(), self._index.id
        wanted: dict[str, str] = {}
        unencodable: list[str] = []
        rebuilt = relabelled = 0
        freed: list[str] = []
        for batch in self._contexts.batches(list(self._index.records()), self.batch_size):
            items = self._contexts.items(batch, unencodable)
            wanted.update((item.id, item.key.id) for item in items)
            freed += self._references.add(owner, {item.id: item.key.id for item in items})
            rebuilt += self.encode_missing(items)
            relabelled += self.relabel(items)
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

    def _prepare(self, items: Sequence[Item], *, can_store: bool) -> tuple[list[str], bool]:
        """Reference and entry; the ids let go of, and whether the store can be written."""
        freed: list[str] = []
        if can_store:
            try:
                freed = self._references.add(self._index.id, {item.id: item.key.id for item in items})
                self.encode_missing(items)
            except StoreWriteError as error:
                # Encoding the rest for nothing would take long; the next call tries again.
                can_store = False
                self._warn(error)
        if not can_store:
            self.uncached += sum(item.key not in self._store for item in items)
        return freed, can_store

    def build(self, items: Sequence[Item], *, label: bool) -> int:
        """References, entries and, if asked for, labels of some records; how many entries were built."""
        freed = self._references.add(self._index.id, {item.id: item.key.id for item in items})
        built = self.encode_missing(items)
        if label:
            self.relabel(items)
        self._references.collect(freed, self._store.delete)
        return built

    def encode_missing(self, items: Sequence[Item]) -> int:
        """Encode and put what the store lacks; how many entries that were."""
        missing = list({item.key.id: item for item in items if item.key not in self._store}.values())
        for some in _read_in_one_go(missing, self.batch_size):
            tokens, contexts = [item.key.tokens for item in some], [item.context for item in some]
            start = time.perf_counter()
            if any(contexts):
                rows = self._contexts.require_encoder().encode_behind(tokens, contexts)
            else:
                rows = self._encoder.encode(tokens)
            share = (time.perf_counter() - start) / max(1, sum(map(len, tokens)))
            entries = [(item.key, kv) for item, kv in zip(some, rows, strict=True)]
            put_many(self._store, entries, cost_seconds=[share * len(text) for text in tokens])
        return len(missing)

    def relabel(self, items: Sequence[Item]) -> int:
        """Correct our metadata fields where they are wrong; in how many records that was."""
        wrong = [item for item in items if item.relabelling]
        if wrong:
            self._index.update_metadata([item.id for item in wrong], [item.relabelling for item in wrong])
        return len(wrong)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """What the store refuses is said, once, and is no reason to refuse the documents."""
        try:
            yield
        except StoreWriteError as error:
            self._warn(error)

    def _warn(self, error: StoreWriteError) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "documents are kept without prebuilt caches and read anew when asked for: %s", error
            )


def _read_in_one_go(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """About `size` items at a time, so that memory does not grow with documents; runs are not cut."""
    some: list[Item] = []
    for item in items:
        if len(some) >= size and not some[-1].is_followed_by(item):
            yield some
            some = []
        some.append(item)
    if some:
        yield some


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
