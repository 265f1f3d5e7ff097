"""From a plan and its caches to what attention reads: documents at their places, fresh tokens around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kvrag.plan import Cached, Literal, PromptPlan
from kvrag.segments import KV, Segment, SegmentTable


@dataclass(frozen=True, slots=True)
class Composed:
    """A prompt, ready to be read.

    Attributes:
        table: prefix and documents at their places.
        tokens: the fresh tokens, in prompt order.
        positions: of the fresh tokens.
        question: first fresh row behind all documents.
    """

    table: SegmentTable
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    question: int

    @property
    def end(self) -> int:
        """Position of the first token of the answer."""
        return self.positions[-1] + 1 if self.positions else self.table.end


@dataclass(frozen=True, slots=True)
class Unit:
    """A document and the text between it and the next one, which travels with it.

    Attributes:
        number: of the document, in retrieval order.
        kv: its rows.
        start: position of its first row.
        tail: fresh tokens behind it.
        again: rows of the document that are to be read again, ascending.
        source: what the document is a chunk of; None: nothing is known.
    """

    number: int
    kv: KV
    start: int
    tail: tuple[int, ...] = ()
    again: tuple[int, ...] = ()
    source: str | None = None

    @property
    def length(self) -> int:
        """Positions that document and tail take."""
        return self.kv.num_tokens + len(self.tail)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A prompt as documents that can be put elsewhere, and the text around them.

    Attributes:
        prefix: rows of the shared prefix, at position 0; None for none.
        lead: fresh tokens between prefix and first document.
        units: the documents, in the order in which they see each other when they are read again.
        question: fresh tokens behind all documents.
        query: position of the first of those.
    """

    prefix: KV | None
    lead: tuple[int, ...]
    units: tuple[Unit, ...]
    question: tuple[int, ...]
    query: int

    @property
    def start(self) -> int:
        """Position of the first document that stands where the prompt has it."""
        return (self.prefix.num_tokens if self.prefix else 0) + len(self.lead)

    def placed(self, starts: Mapping[int, int | None], query: int) -> Arrangement:
        """The documents at other positions; those at None are left out, with their tails.

        Args:
            starts: position of each document's first row, by its number.
            query: position of the first token behind the documents.
        """
        moved = [(unit, starts[unit.number]) for unit in self.units]
        units = tuple(replace(unit, start=at) for unit, at in moved if at is not None)
        return replace(self, units=units, query=query)

    def only(self, documents: Collection[int]) -> Arrangement:
        """The arrangement without the other documents and their tails; nothing moves."""
        return replace(self, units=tuple(u for u in self.units if u.number in documents))

    def packed(self) -> Arrangement:
        """The documents one behind the other, in their order, and the query behind them."""
        at, starts = self.start, {}
        for unit in self.units:
            starts[unit.number] = at
            at += unit.length
        return self.placed(starts, at)

    def in_order(self) -> Arrangement:
        """The same places, the documents in the order of these; at one place, in retrieval order."""
        return replace(self, units=tuple(sorted(self.units, key=lambda u: (u.start, u.number))))

    def again(self, rows: Mapping[int, Sequence[int]]) -> Arrangement:
        """With rows of documents that are read again, with everything before them visible.

        Args:
            rows: for documents by number, rows in any order; other documents keep what they have.
        """
        units = tuple(
            replace(u, again=tuple(sorted(rows[u.number]))) if rows.get(u.number) else u for u in self.units
        )
        return replace(self, units=units)

    @property
    def num_again(self) -> int:
        """Rows of documents that are read again."""
        return sum(len(unit.again) for unit in self.units)

    def composed(self) -> Composed:
        """Segments and fresh tokens, as attention takes them."""
        segments = [Segment(self.prefix, 0)] if self.prefix is not None else []
        tokens = list(self.lead)
        positions = list(range(self.start - len(self.lead), self.start))
        for unit in self.units:
            segments.append(
                Segment(
                    unit.kv,
                    unit.start,
                    first_row=len(tokens),
                    document=unit.number,
                    hidden=unit.again,
                    standing=len(unit.again),
                )
            )
            tokens += [unit.kv.tokens[row] for row in unit.again]
            positions += [unit.start + row for row in unit.again]
            tokens += unit.tail
            behind = unit.start + unit.kv.num_tokens
            positions += range(behind, behind + len(unit.tail))
        question = len(tokens)
        tokens += self.question
        positions += range(self.query, self.query + len(self.question))
        return Composed(SegmentTable(tuple(segments)), tuple(tokens), tuple(positions), question)


def compose(
    plan: PromptPlan,
    prefix: KV | None,
    documents: Sequence[KV],
    sources: Sequence[str | None] | None = None,
) -> Arrangement:
    """Put prefix and documents where the plan has them; everything else is fresh.

    A prompt has to end with a fresh token, whose logits begin the answer: if a document or the prefix ends
    it, the last token of that span is read again and its row left out of the segment.

    Args:
        plan: spans of the prompt.
        prefix: rows of the plan's prefix; None if it has none.
        documents: rows of the plan's cached spans, in order.
        sources: what each of them is a chunk of; None: nothing is known.
    """
    caches = iter(documents)
    origins = iter(sources or [None] * len(documents))
    units: list[Unit] = []
    between: list[list[int]] = [[]]  # fresh tokens before the first document, behind the first, ...
    at = 0
    for span in plan.spans:
        if isinstance(span, Literal):
            between[-1] += span.tokens
        elif isinstance(span, Cached):
            units.append(Unit(len(units), next(caches), at, source=next(origins)))
            between.append([])
        at += len(span.tokens)
    if plan.tokens and not between[-1]:
        between[-1] = [plan.tokens[-1]]
        if units:
            units[-1] = replace(units[-1], kv=_shortened(units[-1].kv))
        else:
            prefix = prefix and _shortened(prefix)
    *tails, question = between
    lead = tails.pop(0) if units else []
    for i, tail in enumerate(tails):  # of all documents but the last
        units[i] = replace(units[i], tail=tuple(tail))
    rows = prefix if prefix is not None and prefix.num_tokens else None
    return Arrangement(rows, tuple(lead), tuple(units), tuple(question), at - len(question))


def _shortened(kv: KV) -> KV:
    """The rows without the last one."""
    return kv.head(kv.num_tokens - 1)
