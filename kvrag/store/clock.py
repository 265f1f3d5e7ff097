"""The store's time, for times to live: the wall clock's, except that it never goes back.

Wall clocks are set: by a person, by NTP, by a battery that ran dry. The rule:

- Set back: the store's time stands still for that step, then goes on at the wall clock's pace, so it stays
  ahead from then on. Nothing lives longer than its time to live in time that has passed.
- Set forward: nobody can tell it from time that has passed. What had less left than the jump expires, which
  is a miss and is read anew: never wrong. What is put afterwards lives as long as it was given, also when the
  clock is set right again.

How far the time is ahead is kept in the index. It needs not be: an entry with a time to live says when it was
made, and a store that reads one made later than now moves its time there. So at most one time to live passes
before an entry expires, whatever was lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_SMALLEST_STEP = 1.0
"""Seconds; two threads that read the clock at once, and NTP, take smaller ones back."""


class StoreClock:
    """Seconds since 1970 that never go back by more than a second; may be asked from any thread.

    Args:
        wall: gives the wall clock's seconds since 1970.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._last = wall()
        self._ahead = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """The store's time."""
        with self._lock:
            return self._observe() + self._ahead

    def at_least(self, then: float) -> float:
        """The store's time, after learning that `then` has been reached already."""
        with self._lock:
            wall = self._observe()
            self._ahead = max(self._ahead, then - wall)
            return wall + self._ahead

    def state(self) -> tuple[float, float]:
        """(wall clock's latest time, seconds ahead of it), for `merge` in another process or later."""
        with self._lock:
            self._observe()
            return self._last, self._ahead

    def merge(self, last: float, ahead: float) -> None:
        """Learn what another clock of the same store has seen: both numbers of its `state`."""
        with self._lock:
            step = last - self._observe()
            self._ahead = max(self._ahead, ahead + (step if step > _SMALLEST_STEP else 0.0))

    def _observe(self) -> float:
        wall = self._wall()
        if wall < self._last - _SMALLEST_STEP:
            self._ahead += self._last - wall
            self._last = wall
        self._last = max(self._last, wall)
        return wall
