"""Which texts an engine may have caches of, as adapters to frameworks tell it: ingested or seen."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable

from kvrag.engine import Engine
from kvrag.known import KnownTexts
from kvrag.store.key import tagged_digest


class Ingested:
    """Texts by content over an engine's registry (`Engine.known`).

    A framework may ingest one text several times, under names of its own: it is known until it was removed as
    often. Texts that a retriever merely returned are known, too, until the registry needs the room.
    May be used from any thread.
    """

    def __init__(self, known: KnownTexts) -> None:
        """Tell a registry."""
        self.known = known
        self._count: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, texts: Iterable[str]) -> None:
        """Texts were ingested, each once more."""
        listed = list(texts)
        with self._lock:
            self._count.update(map(key_of, listed))
            self.known.update({key_of(text): text for text in listed})

    def see(self, texts: Iterable[str]) -> None:
        """Texts came from a retriever and will probably stand in a prompt."""
        self.known.update({key_of(text): text for text in texts})

    def remove(self, texts: Iterable[str]) -> None:
        """Ingested texts were deleted, each once; the last time, it is as if they had never been seen."""
        with self._lock:
            for key in map(key_of, texts):
                self._count[key] -= 1
                if self._count[key] <= 0:
                    del self._count[key]
                    self.known.remove(key)

    def __contains__(self, text: str) -> bool:
        """Whether a text is known."""
        return key_of(text) in self.known


def key_of(text: str) -> str:
    """The name under which a text is known: 96 bits of a digest, without surrounding white space."""
    return tagged_digest({"text": text.strip().encode("utf-8", "surrogatepass")})[:24]


_ingested: weakref.WeakKeyDictionary[Engine, Ingested] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def known_of(engine: Engine) -> Ingested:
    """What is known to one engine."""
    with _lock:
        found = _ingested.get(engine)
        if found is None or found.known is not engine.known:
            found = _ingested[engine] = Ingested(engine.known)
        return found


def engines() -> list[Engine]:
    """Engines that anything is known to, or may become so."""
    with _lock:
        return [engine for engine in _ingested if not engine.is_closed]
