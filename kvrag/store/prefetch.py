"""Reading before it is asked for: documents from when a retriever names them.

The next layer of what is being read is the layers' own matter (`LazyLayers.read_soon`).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from kvrag.errors import CacheMiss, ConfigError
from kvrag.segments import KV, LazyLayers
from kvrag.store.base import CheckReport, KVStore, Receipt, StoreStats
from kvrag.store.counts import Counts
from kvrag.store.found import Found, Place, counts_of, find, locate, tiers_of
from kvrag.store.key import EntryKey
from kvrag.store.traffic import Traffic

logger = logging.getLogger(__name__)

_PATIENCE = 0.5
_OPENING = -1  # goes before every layer


class _Document:
    """An entry that is being read ahead.

    Attributes:
        key: of the entry.
        found: its rows, once it was opened.
        error: what came instead of them.
        opened: set when there is one of both, or nobody wants it any more.
        wanted: for each request that wants it, how many layers.
        next_layer: the first that was not yet read here.
        is_active: it is in the queue, or a thread is at it.
        num_bytes: of the layers read so far, while somebody wants them.
    """

    def __init__(self, key: EntryKey) -> None:
        self.key = key
        self.found: Found | None = None
        self.error: Exception | None = None
        self.opened = threading.Event()
        self.wanted: dict[Fetch, int] = {}
        self.next_layer = 0
        self.is_active = False
        self.num_bytes = 0

    @property
    def lazy(self) -> LazyLayers | None:
        """Its layers, if there are any to be read."""
        layers = None if self.found is None else self.found.kv.layers
        return layers if isinstance(layers, LazyLayers) else None

    @property
    def limit(self) -> int:
        """How many layers anybody wants."""
        return max(self.wanted.values(), default=0)


class Prefetch:
    """A store that reads ahead in the background; everything else is the store behind it.

    Reading is in the order in which attention needs it: every document is opened, then layer 0 of all of
    them, then layer 1, ... A document that several requests want is read once. `get` hands over what was
    read, waits for what is under way and reads the rest itself; what was not found, or failed, is a
    `CacheMiss` there.

    Args:
        store: what is read from; closed with this.
        threads: how many read at once.
        max_bytes: of layers read ahead and still wanted; beyond that reading ahead pauses. No request waits
            for that.
        max_documents: read ahead at once; further ones are read when they are asked for.
        traffic: reads that go first; None: those through this object.

    Raises:
        ConfigError: a number below one.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        threads: int = 2,
        max_bytes: int = 1 << 30,
        max_documents: int = 256,
        traffic: Traffic | None = None,
    ) -> None:
        if min(threads, max_bytes, max_documents) < 1:
            raise ConfigError(
                f"threads={threads}, max_bytes={max_bytes}, max_documents={max_documents}: at least 1 each"
            )
        self.store = store
        self._num_threads, self._max_bytes, self._max_documents = threads, max_bytes, max_documents
        self._traffic = traffic or Traffic()
        self._documents: dict[str, _Document] = {}
        self._queue: list[tuple[int, int, _Document]] = []
        self._tickets = itertools.count()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._counts = Counts()

    # --- reading ahead ---

    def start(self, keys: Sequence[EntryKey], *, num_layers: int | None = None) -> Fetch:
        """Begin to read entries; returns at once.

        Args:
            keys: what will be asked for, the most needed first.
            num_layers: how many layers of each; None: all.

        Returns:
            What says that they are not needed any more: close it when the answer is there.
        """
        fetch = Fetch(self)
        with self._changed:
            for key in keys:
                document = self._documents.get(key.id)
                if document is None:
                    if len(self._documents) >= self._max_documents or self._closed:
                        continue
                    document = self._documents[key.id] = _Document(key)
                    self._counts.add("prefetch_started")
                    self._push(_OPENING, document)
                elif document.lazy is not None and not document.is_active:
                    self._push(document.next_layer, document)  # it had been read as far as was wanted
                document.wanted[fetch] = 1 << 30 if num_layers is None else num_layers
            self._wake()
        return fetch

    # --- the store ---

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Hand over what was read ahead, or read it; see `find` and `KVStore.get`."""
        return self.find(key, by_layer=by_layer).kv

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same, and where it came from.

        Raises:
            CacheMiss: the store has no usable entry, or reading ahead failed in another way.
        """
        with self._traffic.reading():
            document = self._documents.get(key.id)
            if document is None or document.key != key or self._is_gone(document):
                return find(self.store, key, by_layer=by_layer)
            self._hurry(document)
            document.opened.wait()
            found = document.found
            if found is None and document.error is None:
                return find(self.store, key, by_layer=by_layer)
            if found is None:
                self._forget(document)
                if isinstance(document.error, CacheMiss):
                    raise document.error
                raise CacheMiss(f"entry {key.id[:12]} could not be read ahead") from document.error
            self._counts.add("prefetch_used")
            found = replace(found, is_prefetched=True)
            if by_layer or not isinstance(found.kv.layers, LazyLayers):
                return found
            return replace(found, kv=KV(key.tokens, tuple(found.kv.layers)))

    @property
    def tier_names(self) -> tuple[str, ...] | None:
        """Those of the store."""
        return tiers_of(self.store)

    def locate(self, key: EntryKey) -> Place | None:
        """Where the entry would be taken from; at hand if it is being read ahead."""
        place = locate(self.store, key)
        document = self._documents.get(key.id)
        is_ahead = document is not None and document.error is None
        return replace(place, is_at_hand=True) if place is not None and is_ahead else place

    def counts(self) -> dict[str, int]:
        """What the store counts, and documents read ahead: begun, handed over, given up before."""
        names = ("prefetch_started", "prefetch_used", "prefetch_cancelled")
        return counts_of(self.store) | {name: self._counts[name] for name in names}

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """See `KVStore.put`; what was found before is forgotten."""
        self.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
        self._forget(self._documents.get(key.id))

    def delete(self, key_id: str) -> Receipt:
        """See `KVStore.delete`; it is not read ahead any further."""
        self._forget(self._documents.get(key_id))
        receipt = self.store.delete(key_id)
        self._forget(self._documents.get(key_id))
        return receipt

    def __contains__(self, key: object) -> bool:
        """See `KVStore`."""
        return key in self.store

    def ids(self) -> Iterator[str]:
        """See `KVStore.ids`."""
        return self.store.ids()

    def stats(self) -> StoreStats:
        """Those of the store; what is read ahead is a hit there, also if nobody asks for it in the end."""
        return self.store.stats()

    def check(self, *, fix: bool = False) -> CheckReport:
        """See `KVStore.check`."""
        return self.store.check(fix=fix)

    def close(self) -> None:
        """Stop reading ahead, then close the store; the object can be used again, but reads no more ahead."""
        with self._changed:
            self._closed = True
            documents = list(self._documents.values())
            self._queue.clear()
            self._changed.notify_all()
        for document in documents:
            self._forget(document)
        for thread in self._threads:
            thread.join()
        self.store.close()

    # --- in the background ---

    def _push(self, layer: int, document: _Document) -> None:
        document.is_active = True
        heapq.heappush(self._queue, (layer, next(self._tickets), document))

    def _wake(self) -> None:
        while len(self._threads) < self._num_threads and self._queue:
            name = f"kvrag-prefetch-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._changed.notify_all()

    def _hurry(self, document: _Document) -> None:
        """Open a document now, in this thread, if nobody has begun to."""
        with self._changed:
            mine = [item for item in self._queue if item[2] is document and item[0] == _OPENING]
            for item in mine:
                self._queue.remove(item)
            heapq.heapify(self._queue)
        if mine:
            self._open(document)

    def _run(self) -> None:
        while self._wait():
            # Before a task is taken: who waits for a document that nobody is at takes it over.
            self._traffic.give_way(_PATIENCE)
            layer, document = self._take()
            if document is not None:
                self._open(document) if layer == _OPENING else self._read(document, layer)

    def _wait(self) -> bool:
        """Wait for something to do; False when this is closed."""
        with self._changed:
            while not (self._closed or (self._queue and self._num_bytes < self._max_bytes)):
                self._changed.wait()
            return not self._closed

    def _take(self) -> tuple[int, _Document | None]:
        """The next task, if another thread has not taken it meanwhile: a layer, and what to read it of."""
        with self._changed:
            if self._queue and self._num_bytes < self._max_bytes:
                layer, _, document = heapq.heappop(self._queue)
                return layer, document
            return 0, None

    def _open(self, document: _Document) -> None:
        try:
            if document.wanted:
                document.found = find(self.store, document.key, by_layer=True)
        except Exception as error:
            document.error = error
            if not isinstance(error, CacheMiss):
                logger.warning("entry %s could not be read ahead: %r", document.key.id[:12], error)
        finally:
            with self._changed:
                document.is_active = False
                document.opened.set()
                if document.lazy is not None:
                    self._push(0, document)
                    self._wake()

    def _read(self, document: _Document, layer: int) -> None:
        """Read one layer, and put the next one into the queue."""
        layers = document.lazy
        assert layers is not None
        with self._changed:
            document.is_active = layer < min(document.limit, len(layers))
            if not document.is_active:
                return  # until somebody wants more
        worked = self._touch(layers, layer)
        with self._changed:
            document.next_layer = layer + 1
            document.is_active = False
            if worked and document.wanted:
                size = layers.num_bytes // len(layers)
                document.num_bytes += size
                self._num_bytes += size
                self._push(layer + 1, document)
                self._wake()

    def _touch(self, layers: LazyLayers, layer: int) -> bool:
        """Prove one layer; False if it is damaged, which whoever reads it will find out."""
        try:
            layers.touch(layer)
        except Exception as error:
            if not isinstance(error, CacheMiss):
                logger.warning("layer %d could not be read ahead: %r", layer, error)
            return False
        return True

    # --- not needed any more ---

    def _is_gone(self, document: _Document) -> bool:
        """Whether somebody has deleted it in the store itself meanwhile; then it is not handed over."""
        if document.found is None or locate(self.store, document.key) is not None:
            return False
        self._forget(document)
        return True

    def _forget(self, document: _Document | None) -> None:
        """Read no more of a document, whoever wants it."""
        if document is None:
            return
        with self._changed:
            for fetch in list(document.wanted):
                self._release(document, fetch)
            if self._documents.get(document.key.id) is document:
                del self._documents[document.key.id]

    def _release(self, document: _Document, fetch: Fetch) -> None:
        document.wanted.pop(fetch, None)
        if not document.wanted:
            layers = document.lazy
            if document.error is None and (layers is None or document.next_layer < len(layers)):
                self._counts.add("prefetch_cancelled")
            self._num_bytes -= document.num_bytes
            document.num_bytes = 0
            if self._documents.get(document.key.id) is document:
                del self._documents[document.key.id]
            self._changed.notify_all()

    def _drop(self, fetch: Fetch, key_id: str, from_layer: int) -> None:
        with self._changed:
            document = self._documents.get(key_id)
            if document is None or fetch not in document.wanted:
                return
            if from_layer > 0:
                document.wanted[fetch] = min(document.wanted[fetch], from_layer)
            else:
                self._release(document, fetch)

    def _close(self, fetch: Fetch) -> None:
        with self._changed:
            for document in list(self._documents.values()):
                if fetch in document.wanted:
                    self._release(document, fetch)


class Fetch:
    """What one request wants read ahead; a context manager that ends it."""

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch

    def drop(self, key: EntryKey, *, from_layer: int = 0) -> None:
        """Layers from this one on are not needed: the document was pruned there; 0: none of it is."""
        self._prefetch._drop(self, key.id, from_layer)

    def close(self) -> None:
        """Nothing of it is needed any more; what is read by others goes on."""
        self._prefetch._close(self)

    def __enter__(self) -> Fetch:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
