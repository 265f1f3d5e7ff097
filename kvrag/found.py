"""From the spans of a plan to rows: pieces of known texts are cut out of the rows of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from kvrag.caches import Caches, Loaded
from kvrag.model import Model
from kvrag.plan import Cached, Literal, PromptPlan
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import KV, LayerKV, LazyLayers
from kvrag.store.key import EntryKey
from kvrag.tiers import TIERS


def without_lost_pieces(
    caches: Caches, planned: PromptPlan, key_of: Callable[[Cached], EntryKey]
) -> PromptPlan:
    """The plan with those pieces as text to be read whose whole text is not in the store.

    Reading the whole text in order to have a piece of it would take longer than reading the piece.
    """

    def kept(span: Cached) -> bool:
        return span.whole is None or (caches.store is not None and key_of(span) in caches.store)

    if all(span.whole is None for span in planned.cached):
        return planned
    return PromptPlan(
        tuple(
            Literal(span.start, span.end, span.text, span.tokens)
            if isinstance(span, Cached) and not kept(span)
            else span
            for span in planned.spans
        )
    )


def rows_of(model: Model, planned: PromptPlan, loaded: Sequence[Loaded]) -> list[Loaded]:
    """For each cached span its own rows, from those of its entry."""
    return [
        replace(document, kv=cut(document.kv, span.row, span.row + len(span.tokens), model.specs))
        for span, document in zip(planned.cached, loaded, strict=True)
    ]


def hits_by_tier(planned: PromptPlan, loaded: Sequence[Loaded]) -> dict[str, int]:
    """Tokens that came from prebuilt rows, by the way in which their texts were found."""
    pairs = [(span, document) for span, document in zip(planned.cached, loaded, strict=True)]
    sums = {t: sum(len(s.tokens) for s, d in pairs if d.is_hit and s.tier == t) for t in TIERS}
    return {tier: num for tier, num in sums.items() if num}


def cut(kv: KV, start: int, end: int, specs: Sequence[LayerSpec]) -> KV:
    """Rows `start`..`end` of a text, as rows of a text of their own.

    Values stay what they are. Keys are turned back by `start` positions, so that they lie rotated at their
    own positions 0, 1, ... like those of any text; of a beginning, nothing has to be turned or copied.

    Args:
        kv: rows of the whole text.
        start: first row that is wanted.
        end: row behind the last one.
        specs: each layer's rotation.
    """
    if start == 0:
        return kv if end == kv.num_tokens else kv.head(end)
    layers = CutLayers(kv.layers, kv.num_tokens, start, end, specs)
    tokens = kv.tokens[start:end]
    return KV(tokens, layers if isinstance(kv.layers, LazyLayers) else tuple(layers))


class CutLayers(LazyLayers):
    """Rows from the middle of layers, turned when they are touched.

    Args:
        layers: the whole ones.
        num_tokens: rows of each of them.
        start: first row to show.
        end: row behind the last one.
        specs: each layer's rotation.
    """

    def __init__(
        self, layers: Sequence[LayerKV], num_tokens: int, start: int, end: int, specs: Sequence[LayerSpec]
    ) -> None:
        self._layers, self._num_tokens, self._specs = layers, num_tokens, specs
        self._start, self._end = start, end
        self._views: dict[int, LayerKV] = {}

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerKV]:
        """All layers, turned."""
        return map(self.touch, range(len(self)))

    def touch(self, number: int) -> LayerKV:
        """These rows of one layer; see `LazyLayers.touch`."""
        view = self._views.get(number)
        if view is None:
            whole, rotation = self._layers[number], self._specs[number].rotation
            keys = whole.keys[:, self._start : self._end]
            if rotation is not None:
                back = torch.full((keys.shape[1],), -self._start, device=keys.device)
                keys = rotate(keys[None], rotation.turn(back))[0]
            view = self._views[number] = LayerKV(keys, whole.values[:, self._start : self._end])
        return view

    def read_soon(self, number: int) -> None:
        """Start reading the whole layer."""
        if isinstance(self._layers, LazyLayers):
            self._layers.read_soon(number)

    @property
    def num_bytes(self) -> int:
        """Bytes of these rows in all layers."""
        layers = self._layers
        whole = layers.num_bytes if isinstance(layers, LazyLayers) else sum(x.num_bytes for x in layers)
        return self._share(whole)

    @property
    def num_bytes_touched(self) -> int:
        """Bytes of these rows in the layers that were read so far."""
        layers = self._layers
        return self._share(layers.num_bytes_touched) if isinstance(layers, LazyLayers) else self.num_bytes

    def head(self, num_tokens: int) -> LazyLayers:
        """The first of these rows."""
        end = min(self._end, self._start + num_tokens)
        return CutLayers(self._layers, self._num_tokens, self._start, end, self._specs)

    def _share(self, num_bytes: int) -> int:
        return num_bytes * (self._end - self._start) // max(1, self._num_tokens)
