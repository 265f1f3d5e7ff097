"""A hint that documents will soon be asked for: their entries are loaded beside whatever else goes on."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence

from kvrag.engine import Engine
from kvrag.errors import KVRagError
from kvrag.prompt import RagPrompt
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey

logger = logging.getLogger(__name__)


class Prefetch:
    """Loads and verifies entries on a thread of its own, so that the answer finds them in memory.

    A hint decides nothing and may be wrong: what the store lacks stays lacking, and a hint that comes while
    another is worked on is dropped. Stores that keep what they have verified make the next load cheap.
    """

    def __init__(self, engine: Engine) -> None:
        """Load from an engine's store, which the hint does not keep open."""
        self._engine = weakref.ref(engine)
        self._is_busy = threading.Lock()
        self.loaded = 0  # entries found so far

    def hint(self, texts: Sequence[str], prefix: str | RagPrompt = "") -> bool:
        """Begin to load what the store has of these texts; False if another hint is still worked on.

        Args:
            texts: documents as they will stand in the prompt.
            prefix: what they are encoded behind: the form of the prompts, or text of a chat template.
        """
        engine = self._engine()
        if engine is None or engine.is_closed or engine.store is None or not texts:
            return False
        if not self._is_busy.acquire(blocking=False):
            return False
        form = RagPrompt(prefix) if isinstance(prefix, str) else prefix
        thread = threading.Thread(target=self._load, args=(engine, list(texts), form), daemon=True)
        thread.name = f"kvrag prefetch {engine.model.name}"
        thread.start()
        return True

    def wait(self) -> None:
        """Return when nothing is being loaded."""
        with self._is_busy:
            pass

    def _load(self, engine: Engine, texts: list[str], form: RagPrompt) -> None:
        try:
            encoder = engine.encoder(form)
            store = engine.store
            for text in texts:
                if store is not None and not engine.is_closed:
                    self.loaded += _touch(store, EntryKey(encoder.fingerprint, encoder.tokenize(text)))
        except Exception as error:
            # A store that is closed meanwhile may fail in its own way.
            if not (engine.is_closed or isinstance(error, (KVRagError, OSError))):
                raise
            logger.debug("a prefetch ended early: %s", error)
        finally:
            self._is_busy.release()


def _touch(store: KVStore, key: EntryKey) -> int:
    """Load one entry; how many that were."""
    if not key.tokens or key not in store:
        return 0
    store.get(key)
    return 1
