"""The naive store: a dictionary. It says what a store does, and judges the ones that do it fast."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

from kvrag.errors import CacheMiss
from kvrag.segments import KV
from kvrag.store.base import CheckReport, Receipt, StoreStats, check_rows
from kvrag.store.key import EntryKey


class MemoryStore:
    """Keeps rows in this process; for tests, trials and texts that need not outlive it."""

    def __init__(self) -> None:
        self._entries: dict[str, KV] = {}
        self._ends: dict[str, float] = {}  # by the clock that never jumps
        self._lock = threading.Lock()
        self._hits = 0
        self._misses = 0

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the rows that were put, all at once; see `KVStore.get`."""
        with self._lock:
            if self._ends.get(key.id, math.inf) <= time.monotonic():
                self._forget(key.id)
            kv = self._entries.get(key.id)
            if kv is None:
                self._misses += 1
                raise CacheMiss(f"no entry {key.id[:12]} in memory")
            self._hits += 1
            return kv

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Keep the rows themselves, not a copy: they must not change afterwards. Nothing is ever evicted."""
        check_rows(key, kv)
        with self._lock:
            self._entries[key.id] = kv
            self._ends.pop(key.id, None)
            if ttl_seconds is not None:
                self._ends[key.id] = time.monotonic() + ttl_seconds

    def delete(self, key_id: str) -> Receipt:
        """Forget the entry."""
        with self._lock:
            kv = self._forget(key_id)
        return Receipt(key_id, False) if kv is None else Receipt(key_id, True, ("memory",), kv.num_bytes)

    def _forget(self, key_id: str) -> KV | None:
        self._ends.pop(key_id, None)
        return self._entries.pop(key_id, None)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id."""
        return (key.id if isinstance(key, EntryKey) else key) in self._entries

    def ids(self) -> Iterator[str]:
        """Ids of all entries at the time of the call."""
        with self._lock:
            return iter(list(self._entries))

    def stats(self) -> StoreStats:
        """Counts and sizes; memory neither decays nor refuses to be written."""
        with self._lock:
            num_bytes = sum(kv.num_bytes for kv in self._entries.values())
            return StoreStats(
                entries=len(self._entries),
                num_bytes=num_bytes,
                hits=self._hits,
                misses=self._misses,
                damaged=0,
                write_failures=0,
                bytes_read=0,
            )

    def check(self, *, fix: bool = False) -> CheckReport:
        """Nothing can be wrong here."""
        return CheckReport(fixed=fix)

    def close(self) -> None:
        """Nothing to release; the entries go with the object."""
