"""Several entries at once: what one of them waits for, the others need not wait behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, runtime_checkable

from kvrag.errors import CacheMiss
from kvrag.segments import KV
from kvrag.store.base import KVStore, costs_of
from kvrag.store.found import Found, find
from kvrag.store.key import EntryKey
from kvrag.store.together import together


def find_many(store: KVStore, keys: Sequence[EntryKey], *, by_layer: bool = False) -> dict[str, Found]:
    """Rows of those entries that are there, by id; the others are misses, counted as `get` counts them.

    They are read side by side: from a disk that is not in memory yet, several times as fast as in a row.

    Args:
        store: any.
        keys: what to look for; one that comes twice is looked for once.
        by_layer: see `KVStore.get`.
    """
    wanted = {key.id: key for key in keys}

    def look(key: EntryKey) -> Found | None:
        with suppress(CacheMiss):
            return find(store, key, by_layer=by_layer)
        return None

    found = together([partial(look, key) for key in wanted.values()])
    return {key_id: one for key_id, one in zip(wanted, found, strict=True) if one is not None}


def get_many(store: KVStore, keys: Sequence[EntryKey], *, by_layer: bool = False) -> dict[str, KV]:
    """The same, of which only the rows are wanted."""
    return {key_id: found.kv for key_id, found in find_many(store, keys, by_layer=by_layer).items()}


@runtime_checkable
class PutsMany(Protocol):
    """A store that writes many entries in less time than one after the other."""

    def put_many(
        self,
        entries: Sequence[tuple[EntryKey, KV]],
        *,
        cost_seconds: float | Sequence[float] = 0.0,
        ttl_seconds: float | None = None,
    ) -> None:
        """The same as `KVStore.put` for each of them; one number of `cost_seconds` is that of each."""
        ...


def put_many(
    store: KVStore,
    entries: Sequence[tuple[EntryKey, KV]],
    *,
    cost_seconds: float | Sequence[float] = 0.0,
    ttl_seconds: float | None = None,
) -> None:
    """Keep the rows of many texts: as one batch where the store can, else one after the other.

    Args:
        store: any.
        entries: keys and their rows.
        cost_seconds: see `KVStore.put`; of each, or one for each.
        ttl_seconds: see `KVStore.put`; of each.

    Raises:
        StoreWriteError: some or all of them were not written.
    """
    if isinstance(store, PutsMany):
        store.put_many(entries, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
        return
    for (key, kv), cost in zip(entries, costs_of(entries, cost_seconds), strict=True):
        store.put(key, kv, cost_seconds=cost, ttl_seconds=ttl_seconds)
