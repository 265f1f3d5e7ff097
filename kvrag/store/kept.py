"""Entries that this process has verified and still has mapped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from kvrag.segments import KV

Signature = tuple[tuple[int, int, int], ...]
"""(inode, bytes, modification time in ns) of an entry's files: it changes whenever they do."""


class Kept(NamedTuple):
    """Verified rows, and until when they may be handed out (None: no end)."""

    signature: Signature
    kv: KV
    num_bytes: int
    expires: float | None


class KeptEntries:
    """Least recently used entries up to a number of mapped bytes.

    Mapped bytes are page cache, not memory of the process; the bound limits what deleted files can hold
    on to. Rows handed out stay valid after their entry is dropped here.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key_id: str, signature: Signature) -> Kept | None:
        """The entry, if its files are still those that were verified."""
        with self._lock:
            found = self._entries.get(key_id)
            if found is None:
                return None
            if found.signature != signature:
                self._drop(key_id)
                return None
            self._entries.move_to_end(key_id)
            return found

    def keep(
        self, key_id: str, signature: Signature, kv: KV, num_bytes: int, expires: float | None = None
    ) -> None:
        """Remember verified rows, at the expense of those unused for longest."""
        with self._lock:
            self._drop(key_id)
            if num_bytes > self._max_bytes:
                return
            self._entries[key_id] = Kept(signature, kv, num_bytes, expires)
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))

    def drop(self, key_id: str) -> None:
        """Forget one entry."""
        with self._lock:
            self._drop(key_id)

    def clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0

    def _drop(self, key_id: str) -> None:
        found = self._entries.pop(key_id, None)
        if found is not None:
            self._num_bytes -= found.num_bytes
