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
from kvrag.text import joined_tokens


@dataclass(frozen=True, slots=True)
class Opening:
    """The text in front of a conversation.

    Attributes:
        text: all of it.
        documents: texts that stand in it verbatim and may have caches.
        prefix: its beginning, that the documents are encoded behind.
        is_rendered: a chat template wrote it, with any BOS.
        names: what the documents are called; none: they are numbered.
        contexts: for each document the pieces of text that it is encoded behind, beside the prefix; none:
            nothing.
    """

    text: str
    documents: tuple[str, ...] = ()
    prefix: str = ""
    is_rendered: bool = True
    names: tuple[str, ...] = ()
    contexts: tuple[tuple[str, ...], ...] = ()

    @property
    def named(self) -> dict[str, str]:
        """The documents by name."""
        names = self.names or tuple(map(str, range(len(self.documents))))
        return dict(zip(names, self.documents, strict=True))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Pinned:
    """An opening as it was read.

    Attributes:
        opening: the text.
        table: its rows, from position 0 on without gaps.
        is_hit: for each document, whether its rows came from the store.
        keys: the names of the documents, in the order in which they stand.
    """

    opening: Opening
    table: SegmentTable
    is_hit: tuple[bool, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Its length, and the position behind it."""
        return self.table.end


Openings: TypeAlias = "WeakValueDictionary[Opening, Pinned]"
"""What sessions of one engine have pinned: those with the same opening share its rows."""


def pinning(caches: Caches, opening: Opening, shared: Openings, *, stride: int) -> Work[tuple[Pinned, int]]:
    """Read an opening; documents that the store has are loaded, others read and put there.

    Args:
        caches: of the model.
        opening: the text.
        shared: looked into first, and added to.
        stride: most tokens of a pass.

    Returns:
        What is pinned, and how many tokens of it were read for that.
    """
    found, num_read = shared.get(opening), 0
    if found is None:
        found, num_read = yield from _pinning(caches, opening, stride)
        shared[opening] = found
    return found, num_read


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


def _pinning(caches: Caches, opening: Opening, stride: int) -> Work[tuple[Pinned, int]]:
    text = caches.model.text

    def first(piece: str) -> tuple[int, ...]:
        return text.tokenize(piece, first=not opening.is_rendered)

    if not opening.documents:
        tokens = first(opening.text) if opening.text else ()
        num_read = 0 if caches.has_prefix(tokens) else len(tokens)
        kv = caches.prefix(tokens)
        return Pinned(opening, SegmentTable((Segment(kv, 0),) if kv else ())), num_read
    named = opening.named
    planned = plan(
        opening.text, named, prefix=opening.prefix, tokenize=text.tokenize, first=first, ends=text.ends
    )
    behind = dict(zip(named, opening.contexts, strict=False))  # none are told, or all
    contexts = [joined_tokens(text, behind.get(span.key, ())) for span in planned.cached]
    entries = [span.entry for span in planned.cached]
    loaded = yield from caches.loading(first(opening.prefix), entries, contexts=contexts)
    prefix = caches.prefix(planned.prefix.tokens) if planned.prefix else None
    composed = compose(planned, prefix, [document.kv for document in loaded]).composed()
    fresh = FreshRows(caches.model.num_layers)
    yield from reading_prompt(composed.table, composed.tokens, composed.positions, fresh, stride=stride)
    caches.settle(loaded)
    read = literal_segments(caches.model, composed.tokens, fresh)
    segments = [*composed.table.seen_from(fresh.num_rows), *read]
    table = SegmentTable(tuple(sorted(segments, key=lambda s: s.target)))
    hits = tuple(document.is_hit for document in loaded)
    missed = sum(one.kv.num_tokens for one in loaded if not one.is_hit)
    pinned = Pinned(opening, table, hits, tuple(span.key for span in planned.cached))
    return pinned, fresh.num_rows + missed


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
