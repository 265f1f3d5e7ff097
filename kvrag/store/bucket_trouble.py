"""What goes wrong with a bucket: counted, said, and set aside where it is damage."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store.bucket import Bucket, in_words
from kvrag.store.layout import Damaged
from kvrag.store.opened import OpenedObject, object_name

logger = logging.getLogger(__name__)

_MAX_QUARANTINED = 8


class BucketTrouble:
    """Turns what a bucket's library raises into misses and errors of a store, and counts.

    Args:
        bucket: the objects.
        url: of the bucket, for people.

    Attributes:
        counts: what has happened, by name.
        lost: damaged entries that could not be set aside, by manifest.
    """

    def __init__(self, bucket: Bucket, url: str) -> None:
        self._bucket, self._url = bucket, url
        self.counts: Counter[str] = Counter()
        self.lost: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._last_warning = ""

    def over(self) -> None:
        """The bucket has answered: the next failure is worth a warning again."""
        self._last_warning = ""

    def count(self, what: str, number: int = 1) -> None:
        """Add to one of the counts."""
        with self._lock:
            self.counts[what] += number

    def miss(self, key_id: str, reason: str) -> CacheMiss:
        """Count a miss; the error to raise."""
        self.count("misses")
        return CacheMiss(f"no usable entry {key_id[:12]} in {self._url}: {reason}")

    def unread(self, key_id: str, error: Exception) -> CacheMiss:
        """Count what cannot be read, with a warning unless it is just not there; the error to raise."""
        if not isinstance(error, FileNotFoundError):
            self.warn(f"entry {key_id[:12]} cannot be read and will be recomputed", error)
        return self.miss(key_id, "absent" if isinstance(error, FileNotFoundError) else repr(error))

    def warn(self, what: str, error: Exception) -> None:
        """Count a read that failed, and say so."""
        self.count("read_failures")
        words = in_words(error)
        is_new, self._last_warning = words != self._last_warning, words
        # One bucket that nobody can read is one warning, however many documents are asked for.
        logger.log(logging.WARNING if is_new else logging.DEBUG, "%s: %s in %s", what, words, self._url)

    def unwritten(self, error: Exception, what: str) -> StoreWriteError:
        """The error to raise where something could not be written."""
        number = getattr(error, "errno", None) or errno.EIO
        return StoreWriteError(number, f"cannot write to {self._url} ({in_words(error)}): {what}")

    def lose(self, key_id: str, damage: Damaged, *, unless_changed: bytes | None = None) -> None:
        """Move a damaged object out of the way, for a person to look at."""
        try:
            current = OpenedObject(self._bucket, object_name(key_id)).raw_manifest
        except Damaged:
            current = b""
        except Exception:
            return  # gone, or out of reach: there is nothing to move
        if (unless_changed is not None and current != unless_changed) or self.lost.get(key_id) == current:
            return  # replaced meanwhile, or known
        self.count("damaged")
        logger.warning(
            "entry %s in %s is not usable and will be recomputed: %s", key_id[:12], self._url, damage
        )
        try:
            self._bucket.move(object_name(key_id), f"quarantine/{key_id}.{time.time_ns()}.kvrag")
            names = sorted(self.quarantined(""), key=lambda name: name.split(".")[1])
            for name in names[:-_MAX_QUARANTINED]:
                self._bucket.remove(name)
        except Exception as error:
            self.lost[key_id] = current
            logger.warning("it could not be moved aside: %s", error)

    def quarantined(self, key_id: str) -> list[str]:
        """Names of the objects of an entry that were set aside; of all for ""."""
        found = self._bucket.list("quarantine", lambda name: name.startswith(f"quarantine/{key_id}"))
        return [one.name for one in found]
