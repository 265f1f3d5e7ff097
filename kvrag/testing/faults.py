"""Stores that fail on request: what a network, a full disk or a lost permission does to those in front."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

from kvrag.errors import CacheMiss, StoreError, StoreWriteError
from kvrag.segments import KV
from kvrag.store.base import CheckReport, KVStore, Receipt, StoreStats
from kvrag.store.key import EntryKey
from kvrag.store.moving import EntryBytes, MovesBytes, mover

READS = frozenset("get export_bytes".split())
WRITES = frozenset("put import_bytes delete".split())


class FaultyStore:
    """A store that works as another does, until it is told to fail; for tests of what is put in front of one.

    Args:
        store: the one that does the work.
        name: what receipts and counts call it.

    Attributes:
        failing: names of the methods that fail, see `READS` and `WRITES`; reads with a `CacheMiss`, writes
            with a `StoreWriteError`, before anything has changed.
        raw: fail with an `OSError` instead, as no store should.
        calls: names of all methods that were called.
        gate: cleared, every read and write waits until it is set.
    """

    def __init__(self, store: KVStore, name: str = "faulty") -> None:
        self.store, self.name = store, name
        self.failing: frozenset[str] = frozenset()
        self.raw = False
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """See `KVStore.get`."""
        self._call("get")
        return self.store.get(key, by_layer=by_layer)

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """See `KVStore.put`."""
        self._call("put")
        self.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)

    def delete(self, key_id: str) -> Receipt:
        """See `KVStore.delete`."""
        self._call("delete")
        return self.store.delete(key_id)

    def export_bytes(self, key_id: str) -> EntryBytes:
        """See `MovesBytes`."""
        self._call("export_bytes")
        return self._mover.export_bytes(key_id)

    def import_bytes(self, entry: EntryBytes) -> None:
        """See `MovesBytes`."""
        self._call("import_bytes")
        self._mover.import_bytes(entry)

    def __contains__(self, key: object) -> bool:
        """Whether the other store has it."""
        return key in self.store

    def ids(self) -> Iterator[str]:
        """Those of the other store."""
        return self.store.ids()

    def stats(self) -> StoreStats:
        """Those of the other store."""
        return self.store.stats()

    def check(self, *, fix: bool = False) -> CheckReport:
        """What the other store finds."""
        return self.store.check(fix=fix)

    def close(self) -> None:
        """Close the other store."""
        self.store.close()

    @property
    def _mover(self) -> MovesBytes:
        moves = mover(self.store)
        if moves is None:
            raise StoreError(f"{type(self.store).__name__} does not move bytes")
        return moves

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.gate.wait()
        if name in self.failing:
            if self.raw:
                raise OSError(errno.EIO, f"{self.name} was told to fail")
            if name in READS:
                raise CacheMiss(f"{self.name} was told to fail")
            raise StoreWriteError(errno.EIO, f"{self.name} was told to fail")
