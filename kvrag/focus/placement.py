"""At which positions documents appear: when a prompt is composed, and after each pruning.

Dynamic re-positioning and adaptive positional allocation of CacheFocus (Lee et al. 2025, arXiv:2502.11101),
and the layouts it is compared with. Integers in, integers out: nothing here knows rows, models or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvrag.errors import ConfigError, ContextOverflow
from kvrag.focus.beyond import STRATEGIES, side_by_side

Layout = Literal["contiguous", "slots", "overlap", "native"]
Order = Literal["keep", "align", "sort"]
Beyond = Literal["share", "round_robin", "interpolate", "extrapolate", "truncate"]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where everything behind the prefix stands.

    Attributes:
        starts: position of each document's first row, in retrieval order; None: left out of the prompt. A
            pruned document keeps its last one, at which the layers below the pruning have read it.
        query: position of the first token behind the documents; the same in every layer, because that
            token's own keys and values of earlier layers were made there.
    """

    starts: tuple[int | None, ...]
    query: int


@dataclass(frozen=True, slots=True)
class Placement:
    """How positions are given to documents (CacheFocus, arXiv:2502.11101, re-positioning and allocation).

    That documents stand in distinct slots with the query behind them, that the query stays when documents
    are pruned, and what `order` does in equal slots is the paper's. `contiguous`, the direction of `sort`
    and all of `beyond` are ours.

    >>> slots = Placement("slots", order="align")
    >>> before = slots.first([10, 10, 10, 10], start=5, capacity=100)
    >>> before
    Placed(starts=(5, 15, 25, 35), query=45)
    >>> slots.after(
    ...     before, [10, 10, 10, 10], start=5, capacity=100, survivors=[0, 2, 3], scores=[0.3, 0.1, 0.4, 0.2]
    ... )
    Placed(starts=(15, 15, 25, 35), query=45)

    Attributes:
        layout: `contiguous`: one document behind the other. `slots`: the same, each taking as many positions
            as the longest. `overlap`: all at the same positions, the query behind the longest (PCW,
            arXiv:2212.10947; APE, arXiv:2502.05431). `native`: all where they were encoded, the query where
            the full prompt has it (reuse without re-positioning, a control).
        order: after a pruning, survivors stay (`keep`), move up to the query in retrieval order (`align`), or
            move up in ascending order of score, the best next to the query (`sort`). `overlap` and `native`
            have no order: their documents stay.
        beyond: what happens to documents that together exceed the range. With `share`, `round_robin` and
            `interpolate` (see `kvrag.focus.beyond`) the query stands at the range's end, and survivors are
            placed so until they fit; then `order` alone decides. `extrapolate` goes on behind the range;
            `truncate` leaves the last retrieved documents out and places the rest as if alone. The documents
            of `overlap` and `native` do not move for this; only the query and `truncate` apply.
        window: positions the model was trained for, if fewer than it says; `capacity` is derived from them.

    Raises:
        ConfigError: a setting has another value than those above, or the window holds nothing.
    """

    layout: Layout = "contiguous"
    order: Order = "keep"
    beyond: Beyond = "share"
    window: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("layout", Layout), ("order", Order), ("beyond", Beyond)):
            value, expected = getattr(self, name), get_args(known)
            if value not in expected:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(expected)}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; expected at least 1 position, or None")

    def limit(self, max_length: int) -> int:
        """Positions that prompt and answer may take, of a model that says `max_length`."""
        return max_length if self.window is None else min(self.window, max_length)

    def span(self, lengths: Sequence[int]) -> int:
        """Positions from the first document's begin to the query, were there no limit."""
        return max(lengths, default=0) if self.layout == "overlap" else sum(self._widths(lengths))

    def first(self, lengths: Sequence[int], *, start: int, capacity: int) -> Placed:
        """Positions when the prompt is composed.

        Args:
            lengths: rows of each document, in retrieval order, the separator behind it included.
            start: first position behind the prefix.
            capacity: positions for documents: the window less prefix, question and answer.

        Raises:
            ContextOverflow: one document alone exceeds the capacity, and `beyond` is not `extrapolate`.
        """
        if not lengths:
            return Placed((), start)
        self._check(lengths, capacity)
        kept = self._within(lengths, capacity)
        room = self._room(kept, capacity)
        missing = (None,) * (len(lengths) - len(kept))
        starts = (start + offset for offset in self._offsets(self._widths(kept), room))
        return Placed((*starts, *missing), start + room)

    def after(
        self,
        placed: Placed,
        lengths: Sequence[int],
        *,
        start: int,
        capacity: int,
        survivors: Sequence[int],
        scores: Sequence[float],
    ) -> Placed:
        """Positions after a pruning; the query stays, and so does whoever was pruned or left out.

        In slots, M survivors of N stand in slots N - M + r by rank r; in a contiguous layout the last one
        ends where the query begins. Slots that do not fill the range leave the rest of it in front of the
        query, which is where it was when documents shared them.

        Args:
            placed: the positions so far.
            lengths: as given to `first`, pruned documents included.
            start: as given to `first`.
            capacity: as given to `first`.
            survivors: numbers of the documents that are still read, in retrieval order.
            scores: running score of every document, higher is better; of equal ones, the earlier retrieved
                stands farther from the query. Only `sort` looks at them.
        """
        if self.order == "keep" or self._together:
            return placed
        there = [i for i, begin in enumerate(placed.starts) if begin is not None]
        kept = [lengths[i] for i in there]
        ranked = [i for i in survivors if placed.starts[i] is not None]
        if not ranked:
            return placed
        if self.order == "sort":
            ranked.sort(key=lambda i: scores[i])  # stable: equal ones stay in retrieval order

        width_of = dict(zip(there, self._widths(kept), strict=True))
        widths = [width_of[i] for i in ranked]
        room = self._room(kept, capacity)
        # Slots lie on a grid from `start`, whose last slot may end before the query.
        grid = max(1, *kept) if self.layout == "slots" else 1
        gap = max(0, room // grid * grid - sum(widths))
        starts = list(placed.starts)
        for i, offset in zip(ranked, self._offsets(widths, room), strict=True):
            starts[i] = start + gap + offset
        return Placed(tuple(starts), placed.query)

    @property
    def _together(self) -> bool:
        """Whether all documents begin at the same position."""
        return self.layout in {"overlap", "native"}

    def _check(self, lengths: Sequence[int], capacity: int) -> None:
        """Refuse a document that no strategy can keep within the range."""
        longest = max(lengths)
        if longest > capacity and self.beyond != "extrapolate":
            raise ContextOverflow(
                f"a document has {longest} rows and the window leaves {capacity} positions to documents; "
                "index shorter chunks, ask for a shorter answer or set beyond='extrapolate'"
            )

    def _within(self, lengths: Sequence[int], capacity: int) -> Sequence[int]:
        """Lengths of the documents that are not left out: all of them, unless `beyond` is `truncate`."""
        kept = len(lengths)
        while self.beyond == "truncate" and self.span(lengths[:kept]) > capacity:
            kept -= 1
        return lengths[:kept]

    def _widths(self, lengths: Sequence[int]) -> list[int]:
        """Positions that each document takes."""
        return [max(lengths, default=0)] * len(lengths) if self.layout == "slots" else list(lengths)

    def _room(self, lengths: Sequence[int], capacity: int) -> int:
        """Positions from the first document's begin to the query."""
        span = self.span(lengths)
        return span if self.beyond == "extrapolate" else min(span, capacity)

    def _offsets(self, widths: Sequence[int], room: int) -> tuple[int, ...]:
        """Offsets of documents from the farthest to the nearest to the query, from the range's begin."""
        if self._together:
            return (0,) * len(widths)
        if sum(widths) <= room:
            return side_by_side(widths)
        return STRATEGIES[self.beyond](widths, room)
