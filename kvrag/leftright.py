"""Two copies of one thing: readers use the one that nobody changes, so that they never wait for a writer.

A change is made to the copy that is out of sight; the copies are swapped, and once the readers of the other
one have left, it is changed alike. Readers hold no lock while they read; writers wait for the readers that
they meet, one writer at a time.

Source: Ramalhete and Correia 2013, "Left-Right: A Concurrency Control Technique with Wait-Free Population
Oblivious Reads". Departure: arriving and leaving is counted under a mutex, held for a few instructions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class LeftRight(Generic[T]):
    """Two equal things that are read by many threads and changed by some.

    >>> names = LeftRight(list)
    >>> names.change(lambda copy: copy.append("a"))
    >>> with names.reading() as copy:
    ...     print(copy)
    ['a']
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Start with two new ones.

        Args:
            make: gives equal things whenever it is called.
        """
        self._copies = (make(), make())
        self._live = 0
        self._readers = [0, 0]
        self._left = threading.Condition()
        self._writing = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[T]:
        """The copy that stays as it is inside the block; the block must not change anything."""
        with self._left:
            side = self._live
            self._readers[side] += 1
        try:
            yield self._copies[side]
        finally:
            with self._left:
                self._readers[side] -= 1
                self._left.notify_all()

    def change(self, change: Callable[[T], object]) -> None:
        """Make a change; who begins to read afterwards sees it, and nobody sees half of it.

        Args:
            change: called with each copy; it has to do the same to both, and must not fail.
        """
        with self._writing:
            hidden = 1 - self._live
            change(self._copies[hidden])
            with self._left:
                self._live = hidden
                self._left.wait_for(lambda: not self._readers[1 - hidden])
            change(self._copies[1 - hidden])
