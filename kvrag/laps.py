"""What the steps of an answer took."""

from __future__ import annotations

import time

from kvrag.answer import Timing


class Laps:
    """A clock that is told when a step is done."""

    def __init__(self) -> None:
        """Start."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """A step is done."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timing(self) -> Timing:
        """All steps; what came after the last of them was decoding."""
        laps = self._laps
        return Timing(
            plan=laps["plan"],
            load=laps["load"],
            prefill=laps["prefill"],
            first_token=sum(laps.values()),
            decode=time.perf_counter() - self._last,
        )
