"""What attention reads: runs of key/value rows, and the table that says where each one appears."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one text in one layer.

    Attributes:
        keys: [K, T, D], rotated at local positions 0..T-1 (a copy of nothing: may be a mapped file).
        values: [K, T, Dv].
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Rows of this layer."""
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes


class LazyLayers(Sequence[LayerKV]):
    """Layers in main memory, each of them read and proven when it is first touched.

    Touching one (by number, slice or iteration) raises `CacheMiss` if its rows are not what they have to
    be; whatever was computed with this text then has to start over. Lengths and sizes touch nothing.
    """

    @overload
    def __getitem__(self, index: int) -> LayerKV: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerKV, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerKV | tuple[LayerKV, ...]:
        """One layer or several, proven."""
        numbers = range(len(self))[index]
        return self.touch(numbers) if isinstance(numbers, int) else tuple(map(self.touch, numbers))

    @abstractmethod
    def touch(self, number: int) -> LayerKV:
        """Layer `number`, counted from 0; read and proven if nobody has touched it yet.

        Raises:
            CacheMiss: it is damaged.
        """

    def read_soon(self, number: int) -> None:
        """Say that layer `number` will be touched soon: where it can be read ahead, that begins now."""
        return

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all layers, touched or not."""

    @property
    @abstractmethod
    def num_bytes_touched(self) -> int:
        """Bytes of the layers that were touched so far, by anybody who holds them."""

    @property
    def seconds_touched(self) -> float:
        """Seconds that reading and proving the touched layers took, by whichever threads."""
        return 0.0

    @abstractmethod
    def head(self, num_tokens: int) -> LazyLayers:
        """The first rows of every layer; touches none."""


@dataclass(frozen=True, slots=True)
class KV:
    """One text as the model has read it: its tokens and every layer's keys and values.

    The layers may be `LazyLayers`: only those that are touched are ever read.
    """

    tokens: tuple[int, ...]
    layers: Sequence[LayerKV]

    @property
    def num_tokens(self) -> int:
        """Length of the text in tokens."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers; touches none."""
        if isinstance(self.layers, LazyLayers):
            return self.layers.num_bytes
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def num_bytes_touched(self) -> int:
        """Bytes of the layers that were read so far: all of them, unless they are read when touched."""
        return self.layers.num_bytes_touched if isinstance(self.layers, LazyLayers) else self.num_bytes

    @property
    def seconds_touched(self) -> float:
        """Seconds that reading layers has taken since they were handed out; 0 if all were there."""
        return self.layers.seconds_touched if isinstance(self.layers, LazyLayers) else 0.0

    @property
    def device(self) -> torch.device:
        """Where the rows are; touches none."""
        if isinstance(self.layers, LazyLayers) or not self.layers:
            return torch.device("cpu")
        return self.layers[0].keys.device

    def read_soon(self, layer: int) -> None:
        """Say that a layer will be touched soon, so that its rows come while something else is computed."""
        if isinstance(self.layers, LazyLayers):
            self.layers.read_soon(layer)

    def head(self, num_tokens: int) -> KV:
        """The first rows alone, sharing memory: causal rows do not depend on later ones."""
        if isinstance(self.layers, LazyLayers):
            return KV(self.tokens[:num_tokens], self.layers.head(num_tokens))
        layers = tuple(LayerKV(x.keys[:, :num_tokens], x.values[:, :num_tokens]) for x in self.layers)
        return KV(self.tokens[:num_tokens], layers)

    def to(self, device: torch.device) -> KV:
        """The rows on a device; itself if they are there. To another one, all layers are read."""
        if not self.layers or self.device == device:
            return self
        layers = (
            LayerKV(x.keys.to(device, non_blocking=True), x.values.to(device, non_blocking=True))
            for x in self.layers
        )
        return KV(self.tokens, tuple(layers))


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of rows at its place in a prompt: a text's, or those of neighbouring slots of a memory.

    The keys lie rotated at `native`..`native + n - 1` and are to appear at `target`..`target + n - 1`;
    attention turns the query by `native - target` instead of touching the keys.

    Attributes:
        kv: the rows, not copied.
        target: position at which the first row is to appear.
        first_row: fresh rows before this one come earlier in the prompt and do not see the segment.
        document: number of the document in retrieval order; None for the prefix.
        until_layer: the segment is read by layers below this one only; None means by all.
        hidden: rows of the segment that nobody sees, ascending: fresh rows stand for them.
        standing: how many fresh rows from `first_row` on are those that stand for the last hidden rows; each
            sees the rows before its own place only.
        native: position at which the first row's key lies rotated; 0 for a text on its own.
    """

    kv: KV
    target: int
    first_row: int = 0
    document: int | None = None
    until_layer: int | None = None
    hidden: tuple[int, ...] = ()
    standing: int = 0
    native: int = 0

    @property
    def shift(self) -> int:
        """How far the keys appear from where they were rotated."""
        return self.target - self.native

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.target + self.kv.num_tokens

    def is_read_by(self, layer: int) -> bool:
        """Whether layer `layer` reads this segment."""
        return self.until_layer is None or layer < self.until_layer

    def seen_from(self, row: int) -> Segment:
        """The segment for fresh rows from `row` on, counted from there."""
        passed = max(0, row - self.first_row)
        return replace(self, first_row=max(0, self.first_row - row), standing=max(0, self.standing - passed))


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """The ordered segments behind one request; policies derive new tables and never touch rows."""

    segments: tuple[Segment, ...] = field(default=())

    def __iter__(self) -> Iterator[Segment]:
        """Segments in prompt order."""
        return iter(self.segments)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.segments)

    @property
    def num_tokens(self) -> int:
        """Rows of all segments in the first layer."""
        return sum(s.kv.num_tokens for s in self.segments)

    @property
    def num_documents(self) -> int:
        """How many different documents the table holds."""
        return len({s.document for s in self.segments if s.document is not None})

    @property
    def end(self) -> int:
        """First position behind every segment."""
        return max((s.end for s in self.segments), default=0)

    def layer(self, layer: int) -> tuple[Segment, ...]:
        """The segments that one layer reads, in order."""
        return tuple(s for s in self.segments if s.is_read_by(layer))

    def seen_from(self, row: int) -> SegmentTable:
        """The table for fresh rows from `row` on, counted from there."""
        if row == 0:
            return self
        return SegmentTable(tuple(s.seen_from(row) for s in self.segments))

    def moved(self, targets: Sequence[int]) -> SegmentTable:
        """The same rows at other positions.

        Args:
            targets: one position per segment, in order.
        """
        pairs = zip(self.segments, targets, strict=True)
        return SegmentTable(tuple(replace(s, target=t) for s, t in pairs))

    def without(self, documents: Sequence[int], *, from_layer: int = 0) -> SegmentTable:
        """The table with some documents unread from a layer on (layer 0: gone altogether).

        Args:
            documents: numbers of the documents to drop.
            from_layer: first layer that no longer reads them.
        """
        gone = set(documents)
        kept = []
        for segment in self.segments:
            if segment.document not in gone:
                kept.append(segment)
            elif from_layer > 0:
                limit = from_layer if segment.until_layer is None else min(from_layer, segment.until_layer)
                kept.append(replace(segment, until_layer=limit))
        return SegmentTable(tuple(kept))
