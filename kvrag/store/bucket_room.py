"""Keeping a bucket within its bytes: what nobody has used for longest goes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvrag.errors import ConfigError, EntryTooLarge

_LISTED_SECONDS = 600.0  # a list of a shared bucket is true for about so long
_MAX_READS = 1 << 16


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of a bucket as its list says.

    Attributes:
        id: of the entry.
        num_bytes: of its object.
        modified: when it was uploaded, in seconds since 1970; 0 if nobody knows.
    """

    id: str
    num_bytes: int
    modified: float


class BucketRoom:
    """Counts what is uploaded, and lets go of entries when that is too much.

    A bucket has no index, and other machines write to it, too. Sizes and ages come from its list, which is
    asked for when this object's own count says that the bucket is full, and at most every ten minutes then;
    what others upload in between is seen the next time. So several writers may exceed the budget by what they
    upload in ten minutes, until one of them uploads again or sweeps.

    An entry's age begins with its upload, and anew whenever this object reads it; what other machines read,
    nobody here knows.

    Args:
        budget_bytes: of all entries; None: no limit, and nothing is ever listed.
        listed: gives the list.
        erase: removes an entry; false if it was gone.

    Raises:
        ConfigError: a budget that is none.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        listed: Callable[[], Iterable[Listed]],
        erase: Callable[[Listed], bool],
    ) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise ConfigError(f"budget_bytes={budget_bytes}: expected a positive number of bytes, or None")
        self._budget, self._listed, self._erase = budget_bytes, listed, erase
        self._lock = threading.Lock()
        self._reads: dict[str, float] = {}
        self._oldest: deque[Listed] = deque()
        self._total = 0
        self._listed_at = -_LISTED_SECONDS

    def note_read(self, key_id: str) -> None:
        """The entry was used just now."""
        if self._budget is None:
            return
        with self._lock:
            self._reads.pop(key_id, None)
            self._reads[key_id] = time.time()
            if len(self._reads) > _MAX_READS:
                del self._reads[next(iter(self._reads))]

    def make(self, key_id: str, num_bytes: int) -> None:
        """Have room for an entry that is about to be uploaded, and count it.

        Raises:
            EntryTooLarge: it can never fit.
            Exception: whatever the file system's library raises.
        """
        if self._budget is None:
            return
        if num_bytes > self._budget:
            raise EntryTooLarge(
                f"an entry of {num_bytes} bytes is larger than the bucket's budget of {self._budget} bytes: "
                "raise it, cut the text into smaller documents, or choose a codec of fewer bits"
            )
        with self._lock:
            self._evict(num_bytes, key_id)
            self._total += num_bytes

    def keep(self) -> list[str]:
        """Let go of what is too much by a new list; ids of what went."""
        if self._budget is None:
            return []
        with self._lock:
            self._list()
            return self._evict(0, "")

    def _evict(self, num_bytes: int, spared: str) -> list[str]:
        """Remove the oldest until so many bytes fit; the caller holds the lock."""
        assert self._budget is not None
        gone: list[str] = []
        if is_new := time.monotonic() - self._listed_at >= _LISTED_SECONDS:
            self._list()
        while self._total + num_bytes > self._budget:
            if not self._oldest:
                if is_new:
                    break
                is_new = True
                self._list()
                continue
            oldest = self._oldest.popleft()
            last_used = self._last_used(oldest)
            if last_used > oldest.modified and oldest.id != spared:  # it was read since
                self._oldest.append(replace(oldest, modified=last_used))
                continue
            if oldest.id != spared and self._erase(oldest):
                gone.append(oldest.id)
            self._total -= oldest.num_bytes
        return gone

    def _list(self) -> None:
        entries = [replace(entry, modified=self._last_used(entry)) for entry in self._listed()]
        self._total = sum(entry.num_bytes for entry in entries)
        self._oldest = deque(sorted(entries, key=lambda entry: entry.modified))
        self._listed_at = time.monotonic()

    def _last_used(self, entry: Listed) -> float:
        return max(entry.modified, self._reads.get(entry.id, 0.0))
