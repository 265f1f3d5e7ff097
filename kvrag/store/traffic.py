"""Who goes first: an answer that waits for rows, before what is done ahead of time or for later."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Traffic:
    """Counts reads under way, so that background work can let them pass.

    Giving way has an end: a store that is read all the time must still prefetch, upload and erase.
    """

    def __init__(self) -> None:
        self._reads = 0
        self._quiet = threading.Condition()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While somebody waits for rows."""
        with self._quiet:
            self._reads += 1
        try:
            yield
        finally:
            with self._quiet:
                self._reads -= 1
                if not self._reads:
                    self._quiet.notify_all()

    def give_way(self, limit_seconds: float) -> None:
        """Wait until nobody reads, or for so long."""
        end = time.monotonic() + limit_seconds
        with self._quiet:
            while self._reads and (left := end - time.monotonic()) > 0:
                self._quiet.wait(left)
