"""Counters that any thread may add to."""

from __future__ import annotations

import threading
from collections import Counter


class Counts:
    """Numbers by name, since this object was made."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, what: str, number: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[what] += number

    def __getitem__(self, what: str) -> int:
        return self._counts[what]
