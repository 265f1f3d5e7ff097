"""Layers that are read, and decoded, when they are first touched: what nobody touches is never read."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence

from kvrag.segments import LayerKV, LazyLayers
from kvrag.store.together import soon


class MappedLayers(LazyLayers):
    """Layers of a mapped file, each proven once, before it is handed out for the first time.

    Args:
        num_tokens: rows of every layer.
        sizes: bytes of each layer's rows.
        load: gives one layer, verified and counted, or raises; it is asked again at the next touch then.
        finish: called once all layers are proven.
        read_soon: starts reading one layer and returns.
    """

    def __init__(
        self,
        num_tokens: int,
        sizes: Sequence[int],
        load: Callable[[int], LayerKV],
        finish: Callable[[], None],
        read_soon: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._num_tokens = num_tokens
        self._sizes = sizes
        self._load = load
        self._finish = finish
        self._start = read_soon
        self._layers: list[LayerKV | None] = [None] * len(sizes)
        self._num_bytes = sum(sizes)
        self._num_bytes_touched = 0
        self._seconds_touched = 0.0
        self._locks = [threading.Lock() for _ in sizes]
        self._lock = threading.Lock()
        self._left = len(sizes)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._sizes)

    def touch(self, number: int) -> LayerKV:
        """One layer, proven; see `LazyLayers.touch`."""
        found = self._layers[number]
        if found is None:
            with self._locks[number]:  # a layer is counted once: whoever waits here finds it proven
                found = self._layers[number]
                if found is None:
                    start = time.perf_counter()
                    found = self._load(number)
                    self._take(number, found, time.perf_counter() - start)
        return found

    def _take(self, number: int, layer: LayerKV, seconds: float) -> None:
        with self._lock:
            self._layers[number] = layer
            self._seconds_touched += seconds
            self._num_bytes_touched += self._sizes[number]
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._finish()

    def read_soon(self, number: int) -> None:
        """Start reading a layer that nobody has touched yet."""
        if self._layers[number] is None:
            self._start(number)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers: shapes come from the manifest, so that no row is touched."""
        return self._num_bytes

    @property
    def num_bytes_touched(self) -> int:
        """Bytes of the layers proven so far."""
        return self._num_bytes_touched

    @property
    def seconds_touched(self) -> float:
        """Seconds that proving them took."""
        return self._seconds_touched

    def head(self, num_tokens: int) -> LazyLayers:
        """The first rows of every layer; touching one of them proves the layer as a whole."""
        return FirstRows(self, self._num_tokens, num_tokens)


class FetchedLayers(MappedLayers):
    """Layers from afar, several of them under way at once while the reader is at those before.

    Args:
        num_tokens: rows of every layer.
        sizes: bytes of each layer's rows.
        load: gives one layer, see `MappedLayers`; called by several threads, for different layers.
        ahead: how many layers are fetched from the one on that will be touched soon.
    """

    def __init__(
        self, num_tokens: int, sizes: Sequence[int], load: Callable[[int], LayerKV], *, ahead: int
    ) -> None:
        super().__init__(num_tokens, sizes, load, lambda: None, self._fetch)
        self._ahead = ahead
        self._begun: set[int] = set()

    def read_soon(self, number: int) -> None:
        """Fetch a layer and the next ones in the background."""
        for layer in range(number, min(number + self._ahead, len(self))):
            super().read_soon(layer)

    def _fetch(self, number: int) -> None:
        with self._lock:
            if number in self._begun:
                return
            self._begun.add(number)
        itself = weakref.ref(self)  # what nobody holds any more is not fetched

        def touch() -> None:
            layers = itself()
            if layers is not None:
                layers.touch(number)  # what fails here fails again where it is needed

        soon(touch)


class FirstRows(LazyLayers):
    """The first rows of lazy layers; sizes are those of these rows.

    Args:
        layers: the whole ones.
        num_tokens: rows of each of them.
        num_first: how many of these to show.
    """

    def __init__(self, layers: LazyLayers, num_tokens: int, num_first: int) -> None:
        self._layers = layers
        self._num_tokens = num_tokens
        self._num_first = len(range(num_tokens)[:num_first])
        self._views: dict[int, LayerKV] = {}

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def touch(self, number: int) -> LayerKV:
        """The first rows of one layer, proven; see `LazyLayers.touch`."""
        view = self._views.get(number)
        if view is None:
            whole = self._layers[number]
            view = LayerKV(whole.keys[:, : self._num_first], whole.values[:, : self._num_first])
            self._views[number] = view
        return view

    def read_soon(self, number: int) -> None:
        """Start reading the whole layer."""
        self._layers.read_soon(number)

    @property
    def num_bytes(self) -> int:
        """Bytes of the first rows of all layers."""
        return self._share(self._layers.num_bytes)

    @property
    def num_bytes_touched(self) -> int:
        """Bytes of the first rows of the layers proven so far."""
        return self._share(self._layers.num_bytes_touched)

    @property
    def seconds_touched(self) -> float:
        """Those of the whole layers."""
        return self._layers.seconds_touched

    def head(self, num_tokens: int) -> LazyLayers:
        """Fewer of the first rows."""
        return FirstRows(self, self._num_first, num_tokens)

    def _share(self, num_bytes: int) -> int:
        """What these rows are of it: all rows of a layer have the same size."""
        return num_bytes * self._num_first // max(1, self._num_tokens)
