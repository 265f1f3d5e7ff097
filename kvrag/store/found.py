"""Where an entry lies and where its rows came from: what decisions, counts and traces are made of."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from kvrag.segments import KV
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey

MAPPED = "mapped"
"""What an entry on disk is called of which this process has verified and mapped the file before."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store would take an entry from.

    Attributes:
        tier: name of the place: "memory", "mapped", "disk", "objects", ...
        num_bytes: what would be read; None: not known without reading.
        is_certain: it is there; otherwise only presumed, because asking would cost a request.
        is_at_hand: rows lie in memory, or are on their way: nothing is left to decide.
    """

    tier: str
    num_bytes: int | None = None
    is_certain: bool = True
    is_at_hand: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of an entry and where they came from.

    Attributes:
        kv: the rows.
        tier: see `Place`.
        seconds: that getting them took; layers that are read when they are touched come on top.
        is_prefetched: they were read ahead, at least in part.
        num_bytes_before: of the rows, how many bytes had been read before.
        seconds_before: seconds that this had taken.
    """

    kv: KV
    tier: str
    seconds: float = 0.0
    is_prefetched: bool = False
    num_bytes_before: int = 0
    seconds_before: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes read since, so far."""
        return max(0, self.kv.num_bytes_touched - self.num_bytes_before)

    @property
    def seconds_spent(self) -> float:
        """Seconds that getting and touching them have taken so far."""
        return self.seconds + max(0.0, self.kv.seconds_touched - self.seconds_before)


@runtime_checkable
class Finds(Protocol):
    """A store that says where rows came from."""

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same as `KVStore.get`, and where it was; `seconds` is filled in by the function `find`."""
        ...


@runtime_checkable
class Locates(Protocol):
    """A store that says where an entry lies, in microseconds."""

    def locate(self, key: EntryKey) -> Place | None:
        """Where it would be taken from; None: it is not there. Neither reads rows nor asks a network."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A store that counts what happens to it, and says so without looking at its entries."""

    def counts(self) -> dict[str, int]:
        """Numbers since it was opened, by the names that `StoreStats` has."""
        ...


def name_of(store: object) -> str:
    """What a store is called among tiers."""
    return str(getattr(store, "name", type(store).__name__))


def find(store: KVStore, key: EntryKey, *, by_layer: bool = False) -> Found:
    """The rows of an entry, where they came from and how long it took.

    Raises:
        CacheMiss: see `KVStore.get`.
    """
    start = time.perf_counter()
    if isinstance(store, Finds):
        found = store.find(key, by_layer=by_layer)
    else:
        found = Found(store.get(key, by_layer=by_layer), name_of(store))
    return replace(found, seconds=time.perf_counter() - start)


def is_complete(kv: KV) -> bool:
    """Whether all layers have been read."""
    return kv.num_bytes_touched == kv.num_bytes


def at_hand(kv: KV, tier: str) -> Found:
    """Rows that lay there before: what has been touched of them was not read for this caller."""
    return Found(kv, tier, 0.0, False, kv.num_bytes_touched, kv.seconds_touched)


def locate(store: KVStore, key: EntryKey) -> Place | None:
    """Where a store would take an entry from; None: it has none."""
    if isinstance(store, Locates):
        return store.locate(key)
    return Place(name_of(store), is_certain=False)


def tiers_of(store: object) -> tuple[str, ...] | None:
    """Names of the tiers that rows may have to be read from; None: nobody knows."""
    names: tuple[str, ...] | None = getattr(store, "tier_names", None)
    return names


def counts_of(store: object) -> dict[str, int]:
    """What a store counts; nothing if it does not say."""
    return store.counts() if isinstance(store, Counting) else {}
