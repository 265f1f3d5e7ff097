"""Writing documents so that collection, references and store agree, whenever a crash comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvrag.errors import StoreWriteError
from kvrag.index import Index, Metadata
from kvrag.neighbours import KEY_FIELD, Encoder, Item, Neighbourhoods
from kvrag.store.base import KVStore, Receipt
from kvrag.store.references import References

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (documents done, documents in all) after every batch."""


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
        near: Neighbourhoods,
        references: References,
        batch_size: int,
    ) -> None:
        """Work on the parts of one corpus, under its lock."""
        self._index, self._store, self._encoder = index, store, encoder
        self._near, self._references, self.batch_size = near, references, batch_size
        self._has_warned = False
        self.uncached = 0

    def write(
        self,
        items: list[Item],
        into_index: Callable[[Sequence[str], Sequence[str], Sequence[Metadata]], None],
        progress: Progress | None,
    ) -> None:
        """Bring documents into collection and store.

        Args:
            items: in order.
            into_index: the collection's way of taking them.
            progress: told after every batch.
        """
        self._index.begin_writing()
        if self._near.count:
            self._write_behind(items, into_index, progress)
            return
        done, can_store = 0, True
        for batch in batches(items, self.batch_size):
            freed, can_store = self._prepare(batch, can_store=can_store)
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

    def _write_behind(
        self,
        items: list[Item],
        into_index: Callable[[Sequence[str], Sequence[str], Sequence[Metadata]], None],
        progress: Progress | None,
    ) -> None:
        """The same in a corpus with neighbours, who have to be in Chroma before they can be found."""
        self.prepare_neighbours()
        texts = {item.id: item.text for item in items}
        before = self._index.get(list(texts))
        replaced = [record for record in before if record.text != texts[record.id]]
        behind = self._near.behind([record.id for record in replaced])
        stale = {record.id: record for record in [*replaced, *behind]}
        told = self._near.entries(list(stale.values()))
        left = self._near.entries([record for record in before if record.id not in stale])
        into_index(list(texts), list(texts.values()), [item.metadata for item in items])
        with self._warning():
            self.let_go(list(stale), told)
        self.settle([*texts, *(i for i in stale if i not in texts)], progress)
        with self._warning():
            self._references.collect(left, self._store.delete)

    def prepare_neighbours(self) -> None:
        """Before anything is encoded behind neighbours: the collection is to know."""
        if self._near.count:
            self._near.require_encoder()
            self._near.note()

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

    def settle_unlabelled(self, ids: Sequence[str]) -> None:
        """Finish records that an interrupted call left without an entry."""
        if self._near.count:
            found = self._index.get(list(dict.fromkeys(ids)))
            self.settle([record.id for record in found if KEY_FIELD not in record.metadata])

    def settle(self, ids: Sequence[str], progress: Progress | None = None) -> None:
        """Choose neighbours for records of the collection and build their entries."""
        if not ids:
            return
        count, can_store = self._near.count, True
        for start in range(0, len(ids), self.batch_size):
            records = self._index.get(ids[start : start + self.batch_size])
            items = self._near.items(records, [], anew=count)
            freed, can_store = self._prepare(items, can_store=can_store)
            self.relabel(items)
            if freed:
                self._references.collect(freed, self._store.delete)
            if progress is not None:
                progress(min(start + self.batch_size, len(ids)), len(ids))

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

    def encode_missing(self, items: Sequence[Item]) -> int:
        """Encode and put what the store lacks; how many entries that were."""
        missing = list({item.key.id: item for item in items if item.key not in self._store}.values())
        if missing:
            tokens = [item.key.tokens for item in missing]
            if any(item.context for item in missing):
                contexts = [item.context for item in missing]
                rows = self._near.require_encoder().encode_behind(tokens, contexts)
            else:
                rows = self._encoder.encode(tokens)
            for item, kv in zip(missing, rows, strict=True):
                self._store.put(item.key, kv)
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


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
