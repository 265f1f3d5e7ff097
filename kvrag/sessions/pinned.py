"""What always stands in front of a conversation: system prompt and documents, with their prebuilt rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch

from kvrag.caches import Caches
from kvrag.compose import compose
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.plan import plan
from kvrag.prefill import Work, reading_prompt
from kvrag.segments import KV, LayerKV, Segment, SegmentTable


@dataclass(frozen=True, slots=True)
class Opening:
    """The text in front of a conversation.

    Attributes:
        text: all of it.
        documents: texts that stand in it verbatim and may have caches.
        prefix: its beginning, that the documents are encoded behind.
        is_rendered: a chat template wrote it, with any BOS.
    """

    text: str
    documents: tuple[str, ...] = ()
    prefix: str = ""
    is_rendered: bool = True


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Pinned:
    """An opening as it was read.

    Attributes:
        opening: the text.
        table: its rows, from position 0 on without gaps.
        is_hit: for each document, whether its rows came from the store.
    """

    opening: Opening
    table: SegmentTable
    is_hit: tuple[bool, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Its length, and the position behind it."""
        return self.table.end


Openings: TypeAlias = "WeakValueDictionary[Opening, Pinned]"
"""What sessions of one engine have pinned: those with the same opening share its rows."""


def pinning(caches: Caches, opening: Opening, shared: Openings, *, stride: int) -> Work[Pinned]:
    """Read an opening; documents that the store has are loaded, others read and put there.

    Args:
        caches: of the model.
        opening: the text.
        shared: looked into first, and added to.
        stride: most tokens of a pass.
    """
    found = shared.get(opening)
    if found is None:
        found = yield from _pinning(caches, opening, stride)
        shared[opening] = found
    return found


def with_rows(pinned: Pinned, saved: SegmentTable) -> Pinned:
    """The same with rows as they were once, of what is no document, where they are not the same bits.

    Args:
        pinned: as it was read now.
        saved: segments of it as they were; they share nothing with other sessions.

    Raises:
        ValueError: of another opening.
    """
    mine = [s for s in pinned.table if s.document is None]
    if [(s.target, s.native, s.kv.tokens) for s in mine] != [
        (s.target, s.native, s.kv.tokens) for s in saved
    ]:
        raise ValueError("what is pinned is made of other tokens now")
    pairs = list(zip(mine, saved, strict=True))
    if all(_is_same(a.kv, b.kv) for a, b in pairs):
        return pinned
    rows = iter(saved)
    table = SegmentTable(tuple(s if s.document is not None else next(rows) for s in pinned.table))
    return replace(pinned, table=table)


def _is_same(a: KV, b: KV) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in pairs)


def _pinning(caches: Caches, opening: Opening, stride: int) -> Work[Pinned]:
    text = caches.model.text

    def first(piece: str) -> tuple[int, ...]:
        return text.tokenize(piece, first=not opening.is_rendered)

    if not opening.documents:
        kv = caches.prefix(first(opening.text)) if opening.text else None
        return Pinned(opening, SegmentTable((Segment(kv, 0),) if kv else ()))
    named = {str(i): document for i, document in enumerate(opening.documents)}
    planned = plan(
        opening.text, named, prefix=opening.prefix, tokenize=text.tokenize, first=first, ends=text.ends
    )
    loaded = yield from caches.loading(first(opening.prefix), [span.entry for span in planned.cached])
    prefix = caches.prefix(planned.prefix.tokens) if planned.prefix else None
    composed = compose(planned, prefix, [document.kv for document in loaded]).composed()
    fresh = FreshRows(caches.model.num_layers)
    yield from reading_prompt(composed.table, composed.tokens, composed.positions, fresh, stride=stride)
    caches.settle(loaded)
    read = literal_segments(caches.model, composed.tokens, fresh)
    segments = [*composed.table.seen_from(fresh.num_rows), *read]
    table = SegmentTable(tuple(sorted(segments, key=lambda s: s.target)))
    return Pinned(opening, table, tuple(document.is_hit for document in loaded))


def literal_segments(model: Model, tokens: Sequence[int], fresh: FreshRows) -> list[Segment]:
    """Fresh rows as segments, one for each run of neighbouring positions; the rows are copied."""
    places = fresh.positions
    starts = [i for i, p in enumerate(places) if not i or places[i - 1] != p - 1]
    found = []
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        kv = KV(
            tuple(tokens[start:end]),
            tuple(_layer(fresh.rows(layer), start, end) for layer in range(model.num_layers)),
        )
        found.append(Segment(kv, places[start], native=places[start]))
    return found


def _layer(rows: tuple[torch.Tensor, torch.Tensor], start: int, end: int) -> LayerKV:
    keys, values = rows
    return LayerKV(keys[0, :, start:end].clone(), values[0, :, start:end].clone())
