"""What each tier of a `TieredStore` is, can do, and is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrag.store.base import EntryInfo, KVStore, Receipt, StoreStats
from kvrag.store.disk import DiskStore
from kvrag.store.memory import MemoryTier
from kvrag.store.moving import MovesBytes, mover


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier among others.

    Attributes:
        name: of the tier.
        hits: loads that it answered.
        pending: entries that it is still to get.
        stats: its own counts, which also tell of what `TieredStore` asked it for otherwise.
    """

    name: str
    hits: int
    pending: int
    stats: StoreStats


@dataclass(frozen=True, slots=True)
class Tier:
    """A store in its place.

    Attributes:
        name: unique among the tiers, the same whenever they are opened.
        store: itself.
        mover: what moves its entries as bytes, if anything does.
        memory: itself, if it only keeps copies.
        is_filled: whether rows are copied into it.
    """

    name: str
    store: KVStore
    mover: MovesBytes | None
    memory: MemoryTier | None
    is_filled: bool


def placed(stores: Sequence[KVStore], copy_mapped: bool) -> list[Tier]:
    """Names for the tiers, and what can be done with each."""
    tiers: list[Tier] = []
    names: Counter[str] = Counter()
    for number, store in enumerate(stores):
        name = str(getattr(store, "name", "disk" if isinstance(store, DiskStore) else type(store).__name__))
        names[name] += 1
        memory = store if isinstance(store, MemoryTier) else None
        is_mapped_below = any(isinstance(below, DiskStore) for below in stores[number + 1 :])
        is_filled = memory is not None and (
            copy_mapped or memory.is_faster_than_a_mapping or not is_mapped_below
        )
        name = f"{name} {names[name]}" if names[name] > 1 else name
        tiers.append(Tier(name, store, mover(store), memory, is_filled))
    return tiers


def info_of(store: Any, key_id: str) -> EntryInfo | None:
    """What a store knows of an entry, if it is one that knows anything."""
    info = getattr(store, "info", None)
    found = None if info is None else info(key_id)
    return found if isinstance(found, EntryInfo) else None


def merged(key_id: str, receipts: Sequence[Receipt]) -> Receipt:
    """One receipt for what several tiers have erased."""
    return Receipt(
        key_id,
        any(receipt.existed for receipt in receipts),
        tuple(place for receipt in receipts for place in receipt.erased),
        sum(receipt.num_bytes for receipt in receipts),
    )
