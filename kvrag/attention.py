"""The attention of one forward pass: which rows each layer reads, where they appear, and who sees them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from kvrag.backbone import AttentionCall
from kvrag.errors import UnsupportedModel
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag_kernels import RowMask, Rows, Turn, parted_attention, segment_attention


class FreshRows:
    """Keys and values of the tokens read in this request, layer by layer, at their own positions.

    Keys are rotated at their absolute positions. Buffers grow by doubling, so a decode step copies nothing.

    Attributes:
        positions: of all rows.
        borders: [S], int64: where the rows that were copied from each segment of a table end; None if none
            were.
    """

    def __init__(self, num_layers: int, *, reserve: int = 64) -> None:
        """Make room for `reserve` tokens per layer; more is made when needed."""
        self.positions: list[int] = []
        self.borders: torch.Tensor | None = None
        self._reserve = reserve
        self._buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._counts = [0] * num_layers

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add rows to one layer and return all of its rows.

        Args:
            layer: number of the layer.
            keys: [1, K, T, D], rotated.
            values: [1, K, T, Dv].

        Returns:
            [1, K, n, D] and [1, K, n, Dv], views that stay valid until the next append.
        """
        start = self._counts[layer]
        end = start + keys.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[2] < end:
            buffers = self._grow(buffers, keys, values, start, max(end + self._reserve, 2 * start))
            self._buffers[layer] = buffers
        buffers[0][:, :, start:end] = keys
        buffers[1][:, :, start:end] = values
        self._counts[layer] = end
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    @property
    def num_rows(self) -> int:
        """Rows of the first layer."""
        return self._counts[0]

    def behind(self, table: SegmentTable, specs: Sequence[LayerSpec]) -> FreshRows:
        """These rows behind a copy of the table's, all in one run per layer, keys turned to their places.

        One run is attended to in one call; worth its copy once many tokens are decoded over the same table.
        Every layer has to read every segment. The copy remembers in `borders` where each segment's rows end.
        """
        merged = FreshRows(len(specs), reserve=self._reserve)
        ends = list(accumulate(s.kv.num_tokens for s in table))
        device = table.segments[0].kv.layers[0].keys.device
        merged.borders = torch.tensor(ends, device=device)
        merged.positions = [p for s in table for p in range(s.target, s.end)] + self.positions
        turns = {spec: _turns(spec, table) for spec in dict.fromkeys(specs)}
        total = table.num_tokens + self.num_rows
        for layer, spec in enumerate(specs):
            own = self._buffers[layer]
            if own is None:
                raise ValueError("nothing was read yet")
            keys, values = self._grow(None, own[0], own[1], 0, total + self._reserve)
            at = 0
            for segment, turn in zip(table, turns[spec], strict=True):
                kv, end = segment.kv.layers[layer], at + segment.kv.num_tokens
                keys[0, :, at:end] = rotate(kv.keys[None], turn)[0]
                values[0, :, at:end] = kv.values
                at = end
            keys[:, :, at:total] = own[0][:, :, : self.num_rows]
            values[:, :, at:total] = own[1][:, :, : self.num_rows]
            merged._buffers[layer] = (keys, values)
            merged._counts[layer] = total
        return merged

    @staticmethod
    def _grow(
        old: tuple[torch.Tensor, torch.Tensor] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        used: int,
        capacity: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_keys = keys.new_empty((*keys.shape[:2], capacity, keys.shape[3]))
        new_values = values.new_empty((*values.shape[:2], capacity, values.shape[3]))
        if old is not None:
            new_keys[:, :, :used] = old[0][:, :, :used]
            new_values[:, :, :used] = old[1][:, :, :used]
        return new_keys, new_values


def _turns(spec: LayerSpec, table: SegmentTable) -> list[Turn | None]:
    """How each segment's keys are turned from where they lie to where they appear: one angle for all rows."""
    if spec.rotation is None:
        return [None] * len(table)
    return [spec.rotation.turn(torch.tensor([s.target], device=s.kv.layers[0].keys.device)) for s in table]


class _Layout:
    """Who sees what for one kind of layer and one set of segments; the same for all such layers of a pass."""

    def __init__(
        self, spec: LayerSpec, segments: Sequence[Segment], positions: torch.Tensor, fresh: Sequence[int]
    ) -> None:
        targets = torch.tensor([*(s.target for s in segments), 0], device=positions.device)
        self.turn: Turn | None = None
        if spec.rotation is not None:
            # Fresh keys lie at absolute positions: their turn is the position itself.
            self.turn = spec.rotation.turn(positions[None] - targets[:, None])
        self.own_turn = _last(self.turn)
        self.spans = [_span(s, spec.window, positions) for s in segments]
        self.is_causal = not fresh and spec.window is None and len(positions) > 1
        self.fresh_mask = None if self.is_causal else _fresh_mask(spec.window, positions, fresh)

    def rows(self, kvs: Sequence[LayerKV], fresh: tuple[torch.Tensor, torch.Tensor]) -> list[Rows]:
        """This layer's rows, nothing copied."""
        placed = [
            Rows(kv.keys[None, :, start:], kv.values[None, :, start:], first_row=first, mask=mask)
            for kv, (start, first, mask) in zip(kvs, self.spans, strict=True)
        ]
        placed.append(Rows(*fresh, mask=self.fresh_mask, causal=self.is_causal))
        return placed


def _last(turn: Turn | None) -> Turn | None:
    """The turn for the last segment alone."""
    return turn and Turn(turn.cos[-1:], turn.sin[-1:], turn.start, turn.interleaved)


def _span(segment: Segment, window: int | None, positions: torch.Tensor) -> tuple[int, int, RowMask | None]:
    """First column that is read, first query row that reads, and the mask where a window cuts through."""
    first = min(segment.first_row, positions.shape[0])
    if window is None or first >= positions.shape[0]:
        return 0, first, None
    hidden = (positions[first:] - segment.target - window + 1).clamp_min(
        0
    )  # columns before this are too far back
    start = min(int(hidden.min()), segment.kv.num_tokens)
    if int(hidden.max()) <= start:
        return start, first, None
    columns = torch.arange(start, segment.kv.num_tokens, device=positions.device)
    return start, first, RowMask(columns[None] >= hidden[:, None])


def _fresh_mask(window: int | None, positions: torch.Tensor, earlier: Sequence[int]) -> RowMask | None:
    """Causal by order, windowed by position; None where every row is seen."""
    rows, before = positions.shape[0], len(earlier)
    if rows == 1 and window is None:
        return None
    allowed = torch.ones(rows, before + rows, dtype=torch.bool, device=positions.device).tril(before)
    if window is not None:
        everywhere = torch.cat(
            (torch.tensor(earlier, dtype=positions.dtype, device=positions.device), positions)
        )
        allowed &= (positions[:, None] - everywhere[None]) < window
    return RowMask(allowed)


class TableReading:
    """Reads fresh tokens over a segment table (see `kvrag.backbone.Reading`).

    Attributes:
        mass: per layer [S, T], float32: share of each fresh row's attention, mean over heads, that each
            segment of the table got (or each that was copied into the fresh rows); zero for segments that
            the layer does not read. Empty without segments.
        focus: the same for squared masses, mean over heads: heads that look at one place count, heads
            that look everywhere hardly do.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        table: SegmentTable,
        fresh: FreshRows,
        positions: Sequence[int],
        *,
        device: torch.device,
    ) -> None:
        """Place `positions` (strictly in prompt order) behind what `fresh` already holds."""
        self.specs, self.table, self.fresh = specs, table, fresh
        self.positions = torch.tensor(list(positions), dtype=torch.long, device=device)
        self.mass: list[torch.Tensor] = []
        self.focus: list[torch.Tensor] = []
        self._layouts: dict[tuple[LayerSpec, tuple[int, ...]], _Layout] = {}

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Rotate and keep the fresh keys, then attend to segments and fresh rows."""
        spec = self.specs[layer]
        read = tuple(i for i, s in enumerate(self.table) if s.is_read_by(layer))
        layout = self._layout(spec, read)
        keys = rotate(call.key, layout.own_turn)
        kvs = [self.table.segments[i].kv.layers[layer] for i in read]
        rows = layout.rows(kvs, self.fresh.append(layer, keys, call.value))
        scale = call.scale * spec.score_factor(call.query.dtype)
        if self.fresh.borders is not None:
            attended = parted_attention(
                call.query,
                rows[-1],
                layout.turn,
                self.fresh.borders,
                scale=scale,
                softcap=call.softcap,
                sinks=call.sinks,
            )
            self._note(attended.mass[:, 0], read)
            return attended.out
        attended = segment_attention(
            call.query, rows, layout.turn, scale=scale, softcap=call.softcap, sinks=call.sinks
        )
        if len(self.table):
            self._note(attended.mass[:-1, 0], read)
        return attended.out

    def _note(self, mass: torch.Tensor, read: tuple[int, ...]) -> None:
        """Keep a layer's masses, [S, H, T] of the segments that it read."""
        self.mass.append(self._spread(mass.mean(1), read))
        self.focus.append(self._spread(mass.square().mean(1), read))

    def _spread(self, mass: torch.Tensor, read: tuple[int, ...]) -> torch.Tensor:
        if len(read) == len(self.table):
            return mass
        full = mass.new_zeros((len(self.table), mass.shape[1]))
        full[list(read)] = mass
        return full

    def _layout(self, spec: LayerSpec, read: tuple[int, ...]) -> _Layout:
        if (spec, read) not in self._layouts:
            segments = [self.table.segments[i] for i in read]
            self._layouts[spec, read] = _Layout(spec, segments, self.positions, self.fresh.positions)
        return self._layouts[spec, read]

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided here."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        _refuse_mask(layer, mask)


class EncodeReading:
    """Reads a batch of texts, each on its own behind one prefix, and keeps their keys and values.

    Texts are padded on the right; a causal text never sees its padding. Every text starts right behind the
    prefix, and its keys are rotated at local positions 0..n-1.
    """

    def __init__(
        self, specs: Sequence[LayerSpec], prefix: KV | None, num_rows: int, *, device: torch.device
    ) -> None:
        """Prepare for texts of up to `num_rows` tokens."""
        self.specs = specs
        self.prefix = prefix
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._local = torch.arange(num_rows, device=device)
        self._turns: dict[LayerSpec, Turn | None] = {}

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Causal attention of each text to the prefix and itself."""
        spec = self.specs[layer]
        before = self.prefix.num_tokens if self.prefix is not None else 0
        turn = self._turn(spec, before)
        keys = rotate(call.key, _last(turn))  # rows 0..n-1 of the text's own segment
        self.kept.append((keys, call.value))
        mask = _fresh_mask(spec.window, self._local, ()) if spec.window is not None else None
        rows = [Rows(keys, call.value, mask=mask, causal=mask is None)]
        if self.prefix is not None:
            kv = self.prefix.layers[layer]
            start, _, cut = _span(Segment(self.prefix, 0), spec.window, self._local + before)
            rows.insert(0, Rows(kv.keys[None, :, start:], kv.values[None, :, start:], mask=cut))
        return segment_attention(
            call.query,
            rows,
            turn,
            scale=call.scale * spec.score_factor(call.query.dtype),
            softcap=call.softcap,
            sinks=call.sinks,
        ).out

    def _turn(self, spec: LayerSpec, before: int) -> Turn | None:
        if spec.rotation is None:
            return None
        if spec not in self._turns:
            positions = [self._local] if self.prefix is None else [self._local + before, self._local]
            self._turns[spec] = spec.rotation.turn(torch.stack(positions))
        return self._turns[spec]

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided here."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        _refuse_mask(layer, mask)


def _refuse_mask(layer: int, mask: Any) -> None:
    if mask is not None:
        raise UnsupportedModel(f"layer {layer} got an attention mask that kvrag did not make")
