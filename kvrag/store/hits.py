"""Loads are counted in memory and written to the index many at a time, while nobody waits for rows."""

from __future__ import annotations

import threading
import time

from kvrag.store.clock import StoreClock
from kvrag.store.ledger import Ledger

_MAX_HITS = 1000
_MAX_SECONDS = 10.0


class Hits:
    """Loads that the index does not know of yet; a crash loses them, and nothing else.

    Args:
        ledger: of the index.
        clock: of the store.
    """

    def __init__(self, ledger: Ledger, clock: StoreClock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._hits: dict[str, int] = {}
        self._since_flush = 0
        self._next_flush = time.monotonic() + _MAX_SECONDS
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._thread: threading.Thread | None = None

    def count(self, key_id: str) -> None:
        """Note one load; every thousandth, or ten seconds after the last, a thread writes them."""
        with self._lock:
            self._hits[key_id] = self._hits.pop(key_id, 0) + 1  # in the order of the last loads
            self._since_flush += 1
            is_due = self._since_flush >= _MAX_HITS or time.monotonic() > self._next_flush
            if is_due:
                self._rest()
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self.flush, name="kvrag-hits")
                    self._thread.start()

    def flush(self) -> None:
        """Write what was counted; entries that the index did not know are taken up."""
        with self._flushing:  # who asks for counts waits for those that are being written
            with self._lock:
                hits, self._hits = list(self._hits.items()), {}
                self._rest()
            if not hits:
                return
            unknown = self._ledger.ask(lambda index: index.hit(hits, self._clock))
            if unknown:
                self._ledger.adopt(unknown)

    def _rest(self) -> None:
        self._since_flush = 0
        self._next_flush = time.monotonic() + _MAX_SECONDS
