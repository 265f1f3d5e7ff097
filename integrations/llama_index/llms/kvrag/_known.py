"""Which texts an engine may have caches of: the one place through which the adapters tell and ask."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable

from kvrag import ChunkMatcher, Engine
from kvrag.store.key import tagged_digest

_MAX_SEEN = 4096


class Known:
    """Texts by key: of those that were seen the newest stay. May be used from any thread."""

    def __init__(self, *, max_seen: int = _MAX_SEEN) -> None:
        """Know nothing yet.

        Args:
            max_seen: most texts that are remembered.
        """
        self._matcher = ChunkMatcher()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._max_seen = max_seen
        self._lock = threading.Lock()

    def see(self, texts: Iterable[str]) -> None:
        """Texts were ingested or retrieved, and will probably stand in a prompt."""
        with self._lock:
            for text in texts:
                key = key_of(text)
                self._matcher.add(key, text)
                self._seen[key] = None
                self._seen.move_to_end(key)
            while len(self._seen) > self._max_seen:
                self._matcher.remove(self._seen.popitem(last=False)[0])

    def forget(self, texts: Iterable[str]) -> None:
        """Texts were deleted."""
        with self._lock:
            for key in map(key_of, texts):
                self._matcher.remove(key)
                self._seen.pop(key, None)

    def chunks_in(self, prompt: str) -> dict[str, str]:
        """Those texts that stand in a prompt, by key."""
        with self._lock:
            return {match.key: self._matcher.text(match.key) for match in self._matcher.find(prompt)}

    def __contains__(self, text: str) -> bool:
        """Whether a text is known."""
        with self._lock:
            return key_of(text) in self._matcher


def key_of(text: str) -> str:
    """The name under which a text is known: 96 bits of a digest, without surrounding white space."""
    return tagged_digest({"text": text.strip().encode("utf-8", "surrogatepass")})[:24]


_known: weakref.WeakKeyDictionary[Engine, Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def known_of(engine: Engine) -> Known:
    """What is known to one engine."""
    with _lock:
        return _known.setdefault(engine, Known())


def engines() -> list[Engine]:
    """Engines that anything is known to, or may become so."""
    with _lock:
        return [engine for engine in _known if not engine.is_closed]
