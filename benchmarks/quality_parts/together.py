"""Reads for many policies at once: in one pass what is due, and once what several of them read alike.

Policies differ in what they do after some layer, and are the same before. A layer that attends to the same
segments at the same places, from the same tokens, behind layers of which that is true as well, gives what it
gave before: it is attended in once and remembered for as long as a context is asked about.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from kvrag.attention import Fixed, TableReading
from kvrag.backbone import AttentionCall
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, Want, Work, found_by, read
from kvrag.segments import SegmentTable

# Tokens of a pass; a longer text is a pass of its own.
BUDGET = 2048

T = TypeVar("T")


class Every(Want):
    """Tokens of which all logits are wanted."""

    __slots__ = ()

    def read(self, model: Model) -> Read:
        """Read them in a pass of their own."""
        return read(
            model,
            self.table,
            self.tokens,
            self.positions,
            self.fresh,
            looking=self.looking,
            logits_to_keep=0,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What attending in a layer gave; the table keeps the rows that the key names by identity."""

    table: SegmentTable
    out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mass: torch.Tensor | None
    focus: torch.Tensor | None
    columns: list[torch.Tensor] | None


@dataclass(slots=True)
class Known:
    """Layers that were attended in while a context was open.

    Attributes:
        layers: by the chain of everything that they depend on.
        links: short names of chains.
        rows: how fresh rows came about, by their identity and number; the rows themselves, to keep them.
    """

    layers: dict[Hashable, _Layer] = field(default_factory=dict)
    links: dict[Hashable, int] = field(default_factory=dict)
    rows: dict[tuple[int, int], tuple[int, FreshRows]] = field(default_factory=dict)

    def link(self, key: Hashable) -> int:
        """A short name of a key: keys of deeper layers hold those of the layers before."""
        return self.links.setdefault(key, len(self.links))


class Remembering(TableReading):
    """Reads a segment table, and takes from what is known what another reading has found already."""

    def __init__(self, known: Known, tokens: Sequence[int], *args: Any, **settings: Any) -> None:
        """Read `tokens`; the rest is as for `TableReading`."""
        super().__init__(*args, **settings)
        self._known, self._before = known, self.fresh.num_rows
        self._chain = self._start(tokens)

    def _start(self, tokens: Sequence[int]) -> int | None:
        """What the first layer depends on beside its table; None if its rows are of unknown origin."""
        behind, _ = self._known.rows.get((id(self.fresh), self._before), (None, None))
        if self._before and behind is None:
            return None
        standing = tuple(sorted(self.fresh.standing.items()))
        # Masses of rows that stand for others are only looked for from there on.
        from_row = self.looking.from_row if standing else None
        places = tuple(self.positions.tolist())
        return self._known.link((behind, tuple(tokens), places, self.looking.group, standing, from_row))

    def _attend(self, layer: int, table: SegmentTable, call: AttentionCall) -> torch.Tensor:
        if self._chain is None:
            return super()._attend(layer, table, call)
        seen = (
            (i, id(s.kv), s.target, s.first_row, s.document, s.hidden, s.standing)
            for i, s in enumerate(table)
            if s.is_read_by(layer)
        )
        self._chain = self._known.link((self._chain, len(table), tuple(seen)))
        by_row = (self._chain, self.looking.from_row)
        key = by_row if layer in self.looking.column_layers else self._chain
        found = self._known.layers.get(key)
        if found is not None:
            self._take(layer, found)
            out = found.out
        else:
            out = super()._attend(layer, table, call)
            self._remember(layer, table, out, by_row)
        if layer == len(self.specs) - 1:
            self._known.rows[id(self.fresh), self.fresh.num_rows] = self._chain, self.fresh
        return out

    def _remember(self, layer: int, table: SegmentTable, out: torch.Tensor, by_row: Hashable) -> None:
        mass, focus = (self.mass[-1], self.focus[-1]) if len(table) else (None, None)
        # Rows behind others may be cut off again and their place used for others.
        own = (x[:, :, self._before :] for x in self.fresh.rows(layer))
        rows = tuple(x.clone() if self._before else x for x in own)
        made = _Layer(table, out, *rows, mass, focus, self.columns.get(layer))
        self._known.layers[self._chain] = made
        if made.columns is not None:
            self._known.layers[by_row] = made

    def _take(self, layer: int, found: _Layer) -> None:
        self.fresh.append(layer, found.keys, found.values)
        if found.mass is not None and found.focus is not None:
            self.mass.append(found.mass)
            self.focus.append(found.focus)
            self.tables.note(layer, found.mass, found.focus)
        if layer in self.looking.column_layers:
            assert found.columns is not None
            self.columns[layer] = found.columns


@dataclass(frozen=True, slots=True)
class _Part:
    reading: Remembering
    rows: slice


class _Several:
    """Attention of a pass whose tokens belong to several readings (see `kvrag.backbone.Reading`)."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Everybody's own."""
        found = []
        for part in self._parts:
            query, key, value = (x[:, :, part.rows] for x in (call.query, call.key, call.value))
            found.append(part.reading.attend(layer, replace(call, query=query, key=key, value=value)))
        return torch.cat(found, dim=2)

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        self._parts[0].reading.take_mask(layer, mask)


class Sharing(Model):
    """A model that remembers layers; `known` is to be replaced when another context is asked about."""

    def __init__(self, model: Model) -> None:  # the same model, not another one to be proven
        """Share the layers of a model."""
        self.__dict__.update(model.__dict__)
        self.known = Known()

    def run(self, ids: torch.Tensor, reading: Any, **settings: Any) -> torch.Tensor:
        """See `Model.run`: readings inside a policy's work, such as heats, take part."""
        if type(reading) is TableReading:
            sharing = self._reading(
                ids[0].tolist(), reading.tables, reading.fresh, reading.positions.tolist(), reading.looking
            )
            sharing.mass, sharing.focus, sharing.columns = reading.mass, reading.focus, reading.columns
            reading = sharing
        return super().run(ids, reading, **settings)

    def _reading(self, tokens: Sequence[int], tables: Any, fresh: Any, places: Any, looking: Any) -> Any:
        return Remembering(
            self.known, tokens, self.specs, tables, fresh, places, device=self.device, looking=looking
        )

    @torch.inference_mode()
    def read_all(self, wants: Sequence[Want]) -> list[Read]:
        """Read in one pass."""
        parts, rows, kept, at = [], [], [0], 0
        for want in wants:
            tables = Fixed(want.table) if isinstance(want.table, SegmentTable) else want.table
            reading = self._reading(want.tokens, tables, want.fresh, want.positions, want.looking)
            end = at + len(want.tokens)
            parts.append(_Part(reading, slice(at, end)))
            rows += range(at if isinstance(want, Every) else end - 1, end)
            kept.append(len(rows))
            at = end
        ids = torch.tensor([[t for want in wants for t in want.tokens]], device=self.device)
        logits = self.run(ids, _Several(parts), rows=torch.tensor(rows, device=self.device))[0]
        return [
            found_by(part.reading, logits[kept[i] : kept[i + 1]], wants[i].positions)
            for i, part in enumerate(parts)
        ]


@torch.inference_mode()
def together(model: Sharing, works: Sequence[Work[T]]) -> list[T]:
    """Do several works; in every round, each reads what it wants next.

    Args:
        model: reads.
        works: in any order; none depends on another.

    Returns:
        What they come to, in order.
    """
    done: dict[int, T] = {}
    wants: dict[int, Want] = {}
    for i in range(len(works)):
        _go_on(i, works[i], None, wants, done)
    while wants:
        for some in _passes(wants):
            reads = model.read_all([wants[i] for i in some])
            for i, found in zip(some, reads, strict=True):
                _go_on(i, works[i], found, wants, done)
    return [done[i] for i in range(len(works))]


def _go_on(
    i: int, work: Generator[Any, Any, T], outcome: Read | None, wants: dict[int, Want], done: dict[int, T]
) -> None:
    """Let a work go on until it wants to read or is done."""
    wants.pop(i, None)
    try:
        ask = work.send(outcome)
        while not isinstance(ask, Want):
            ask = work.send(None)
    except StopIteration as end:
        done[i] = end.value
    else:
        wants[i] = ask


def _passes(wants: dict[int, Want]) -> list[list[int]]:
    """All of them in passes; those that look closest first, because the others can take what they find."""

    def closeness(i: int) -> int:
        looking = wants[i].looking
        return -len(looking.column_layers) if looking else 0

    passes: list[list[int]] = []
    taken = BUDGET
    for i in sorted(wants, key=closeness):
        size = len(wants[i].tokens)
        if taken + size > BUDGET:
            passes.append([])
            taken = 0
        passes[-1].append(i)
        taken += size
    return passes
