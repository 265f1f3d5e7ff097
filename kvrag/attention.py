"""The attention of one forward pass: which rows each layer reads, where they appear, and who sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvrag.backbone import AttentionCall
from kvrag.errors import UnsupportedModel
from kvrag.fresh import FreshRows
from kvrag.layout import Layout, turn_of
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import Segment, SegmentTable
from kvrag_kernels import (
    Attended,
    Group,
    Parts,
    Rows,
    Turn,
    column_mass,
    part_mass,
    parted_attention,
    segment_attention,
)


class Tables(Protocol):
    """The table that each layer reads, which may depend on what the layers before looked at.

    All tables of one reading have the same segments in the same order; targets and `until_layer` may differ.
    """

    def at(self, layer: int) -> SegmentTable:
        """What layer `layer` reads; asked for once per layer, in order."""
        ...

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        """Take what layer `layer` looked at.

        Args:
            layer: number of the layer.
            mass: [S, T], float32, see `TableReading`.
            focus: [S, T], float32.
        """
        ...


class Fixed:
    """One table for all layers."""

    def __init__(self, table: SegmentTable) -> None:
        self._table = table

    def at(self, layer: int) -> SegmentTable:
        """The table."""
        return self._table

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        """Nothing depends on it."""


class Watches(Protocol):
    """Looks on while tokens are read."""

    def note(self, layer: int, row: int, call: AttentionCall, lse: torch.Tensor) -> None:
        """Take what a layer did.

        Args:
            layer: number of the layer.
            row: fresh row of the first token of this pass; noted before from it on: of a pass that failed.
            call: queries and keys, not rotated, and values.
            lse: [B, H, T], float32: log-sum-exp of everything that the layer read; exp(score - lse) is a
                row's probability.
        """
        ...


@dataclass(frozen=True, slots=True)
class Looking:
    """How documents are attended to, beside where they stand.

    Attributes:
        group: temperature and scale of the attention to all documents together (APE); None for none.
        column_layers: layers for which the attention to every single row is wanted.
        from_row: first fresh row that counts for it.
        watch: is told every layer's attention.
    """

    group: Group | None = None
    column_layers: frozenset[int] = frozenset()
    from_row: int = 0
    watch: Watches | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """One segment's part in the attention of a layer, for looking at it closely."""

    call: AttentionCall
    rows: Rows
    turn: Turn | None
    mass: torch.Tensor
    scale: float

    def columns(self, from_row: int, temperature: float = 1.0) -> torch.Tensor:
        """Attention to each row, [n]."""
        return column_mass(
            self.call.query,
            self.rows,
            self.turn,
            self.mass,
            scale=self.scale,
            softcap=self.call.softcap,
            temperature=temperature,
            from_row=from_row,
        )

    def masses(self, parts: Sequence[tuple[int, int]], from_row: int) -> torch.Tensor:
        """Attention to runs of rows, [P, 1, H, T]."""
        return part_mass(
            self.call.query,
            self.rows,
            self.turn,
            self.mass,
            parts,
            scale=self.scale,
            softcap=self.call.softcap,
            from_row=from_row,
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a layer attends to for one request.

    Attributes:
        table: the segments.
        read: numbers of those that the layer reads.
        layout: who sees what.
        rows: of the segments that are read, and last the fresh ones.
        call: queries, and keys as they are before any rotation.
        scale: factor on the scores.
    """

    table: SegmentTable
    read: tuple[int, ...]
    layout: Layout
    rows: list[Rows]
    call: AttentionCall
    scale: float


class TableReading:
    """Reads fresh tokens over a segment table (see `kvrag.backbone.Reading`).

    Attributes:
        mass: per layer [S, T], float32: share of each fresh row's attention, mean over heads, that each
            segment of the table got (or each that was copied into the fresh rows); zero for segments that
            the layer does not read. Empty without segments.
        focus: the same for squared masses, mean over heads: heads that look at one place count, heads
            that look everywhere hardly do.
        columns: per wanted layer and document segment [n], float32: attention to each of the segment's rows,
            mean over heads and counted fresh rows; hidden rows and segments not read have zeros.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        tables: Tables,
        fresh: FreshRows,
        positions: Sequence[int],
        *,
        device: torch.device,
        looking: Looking | None = None,
    ) -> None:
        """Place `positions` (strictly in prompt order) behind what `fresh` already holds."""
        self.specs, self.tables, self.fresh = specs, tables, fresh
        self.looking = looking or Looking()
        self.columns: dict[int, list[torch.Tensor]] = {}
        self.positions = torch.tensor(list(positions), dtype=torch.long, device=device)
        self.mass: list[torch.Tensor] = []
        self.focus: list[torch.Tensor] = []
        self._layouts: dict[tuple[LayerSpec, tuple[tuple[int, int, int], ...]], Layout] = {}
        self._next: tuple[int, SegmentTable] | None = None

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Rotate and keep the fresh keys, then attend to segments and fresh rows."""
        prepared = self.prepare(layer, call)
        return self.finish(layer, prepared, None if self.fresh.parts is not None else self.alone(prepared))

    def prepare(self, layer: int, call: AttentionCall) -> Prepared:
        """Rotate and keep the fresh keys, and say what a layer attends to."""
        spec, table = self.specs[layer], self._table(layer)
        read = tuple(i for i, s in enumerate(table) if s.is_read_by(layer))
        layout = self._layout(spec, table, read)
        keys = rotate(call.key, layout.own_turn)
        kvs = [table.segments[i].kv.layers[layer] for i in read]
        rows = layout.rows(kvs, self.fresh.append(layer, keys, call.value))
        return Prepared(table, read, layout, rows, call, call.scale * spec.score_factor(call.query.dtype))

    def alone(self, prepared: Prepared) -> Attended:
        """Attend to what was prepared, in a launch of its own."""
        call = prepared.call
        return segment_attention(
            call.query,
            prepared.rows,
            prepared.layout.turn,
            scale=prepared.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            group=self.looking.group,
            with_lse=self.looking.watch is not None,
        )

    def finish(self, layer: int, prepared: Prepared, attended: Attended | None) -> torch.Tensor:
        """Note what the layer looked at and let the next one's rows come.

        Args:
            layer: number of the layer.
            prepared: from `prepare`.
            attended: to it; None: the rows were copied together, and are attended to here.

        Returns:
            [1, H, T, Dv].
        """
        if self.fresh.parts is not None:
            out = self._parted(layer, prepared, self.fresh.parts)
        elif attended is None:
            raise ValueError("nothing was attended to")
        else:
            out = attended.out
            self._noted(layer, prepared, attended)
        if layer + 1 < len(self.specs):
            self._look_ahead(layer + 1)
        return out

    def _table(self, layer: int) -> SegmentTable:
        """What a layer reads, as it was decided when the layer before had been attended to."""
        ahead, self._next = self._next, None
        return ahead[1] if ahead is not None and ahead[0] == layer else self.tables.at(layer)

    def _look_ahead(self, layer: int) -> None:
        """Let the rows of the next layer come while the rest of this one is computed.

        Who is dropped is decided now, from the same scores as later: a dropped document's rows never come.
        """
        table = self.tables.at(layer)
        self._next = layer, table
        for segment in table.layer(layer):
            segment.kv.read_soon(layer)

    def _parted(self, layer: int, prepared: Prepared, parts: Parts) -> torch.Tensor:
        """Over rows that were copied together from all segments."""
        call = prepared.call
        attended = parted_attention(
            call.query,
            prepared.rows[-1],
            prepared.layout.turn,
            parts,
            scale=prepared.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        self._note(layer, attended.mass[:, 0], range(len(parts)), len(parts))
        return attended.out

    def _noted(self, layer: int, prepared: Prepared, attended: Attended) -> None:
        """Take what a layer looked at."""
        table, read, rows, call = prepared.table, prepared.read, prepared.rows, prepared.call
        layout, scale, mass = prepared.layout, prepared.scale, attended.mass
        if self.looking.watch is not None and attended.lse is not None:
            self.looking.watch.note(layer, len(self.fresh.positions), call, attended.lse)
        own = _Part(call, rows[-1], layout.own_turn, attended.mass[-1], scale)
        standing = {i: span for place, i in enumerate(read) if (span := self._standing(table.segments[i]))}
        if standing and self.looking.from_row < call.query.shape[2]:
            places = [place for place, i in enumerate(read) if i in standing]
            mass = mass.clone()  # the segments' own masses are still needed
            mass[places] += own.masses(list(standing.values()), self.looking.from_row)
        if len(table):
            self._note(layer, mass[:-1, 0], read, len(table))
        if layer in self.looking.column_layers:
            parts = [
                _Part(call, rows[place], layout.turn and turn_of(layout.turn, place), own_mass, scale)
                for place, own_mass in enumerate(attended.mass[:-1])
            ]
            self.columns[layer] = self._columns(table, read, parts, own, standing)

    def _standing(self, segment: Segment) -> tuple[int, int] | None:
        """The fresh rows that stand for hidden ones of a segment, as far as they were read."""
        start = None if segment.document is None else self.fresh.standing.get(segment.document)
        return None if start is None or not segment.hidden else (start, start + len(segment.hidden))

    def _note(self, layer: int, mass: torch.Tensor, read: Sequence[int], num_segments: int) -> None:
        """Keep a layer's masses, [S, H, T] of the segments that it read."""
        self.mass.append(_spread(mass.mean(1), read, num_segments))
        self.focus.append(_spread(mass.square().mean(1), read, num_segments))
        self.tables.note(layer, self.mass[-1], self.focus[-1])

    def _columns(
        self,
        table: SegmentTable,
        read: Sequence[int],
        parts: Sequence[_Part],
        own: _Part,
        standing: Mapping[int, tuple[int, int]],
    ) -> list[torch.Tensor]:
        """Attention to every row of every segment, [n] each."""
        group, from_row = self.looking.group, self.looking.from_row
        found = [own.mass.new_zeros(s.kv.num_tokens) for s in table]
        fresh = own.columns(from_row) if standing else None
        for part, i in zip(parts, read, strict=True):
            segment = table.segments[i]
            if segment.document is None:
                continue
            seen = part.columns(from_row, group.temperature if group else 1.0)
            found[i][len(found[i]) - len(seen) :] = seen  # leading rows may have been left out
            if fresh is not None and i in standing:
                start, end = standing[i]
                found[i][list(segment.hidden)] = fresh[start:end]
        return found

    def _layout(self, spec: LayerSpec, table: SegmentTable, read: tuple[int, ...]) -> Layout:
        segments = [table.segments[i] for i in read]
        key = (spec, tuple((i, s.target, s.native) for i, s in zip(read, segments, strict=True)))
        if key not in self._layouts:
            self._layouts[key] = Layout(spec, segments, self.positions, self.fresh.positions)
        return self._layouts[key]

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided here."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        refuse_mask(layer, mask)


def _spread(mass: torch.Tensor, read: Sequence[int], num_segments: int) -> torch.Tensor:
    """[S, T] with zeros for segments that were not read."""
    if len(read) == num_segments:
        return mass
    full = mass.new_zeros((num_segments, mass.shape[1]))
    full[list(read)] = mass
    return full


def refuse_mask(layer: int, mask: Any) -> None:
    """Refuse a mask that the modelling code made by itself.

    Raises:
        UnsupportedModel: there is one.
    """
    if mask is not None:
        raise UnsupportedModel(f"layer {layer} got an attention mask that kvrag did not make")
