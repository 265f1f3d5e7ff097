"""Where the rows of a pass appear, and which of its tokens see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvrag.rotary import LayerSpec, Rotation
from kvrag.segments import LayerKV, Segment
from kvrag_kernels import RowMask, Rows, Turn


class Layout:
    """Who sees what for one kind of layer and one set of segments; the same for all such layers of a pass."""

    def __init__(
        self, spec: LayerSpec, segments: Sequence[Segment], positions: torch.Tensor, fresh: Sequence[int]
    ) -> None:
        self.spans = [span_of(s, spec.window, positions) for s in segments]
        self.turn: Turn | None = None
        if spec.rotation is not None:
            pairs = zip(segments, self.spans, strict=True)
            read = [i for i, (segment, span) in enumerate(pairs) if _is_seen(segment, span, len(positions))]
            self.turn = _turn(spec.rotation, segments, read, positions)
        self.own_turn = last_turn(self.turn)
        self.grouped = [s.document is not None for s in segments]
        self.is_causal = not fresh and spec.window is None and len(positions) > 1
        self.fresh_mask = None if self.is_causal else fresh_mask(spec.window, positions, fresh)

    def rows(self, kvs: Sequence[LayerKV], fresh: tuple[torch.Tensor, torch.Tensor]) -> list[Rows]:
        """This layer's rows, nothing copied."""
        placed = [
            Rows(
                kv.keys[None, :, start:],
                kv.values[None, :, start:],
                first_row=first,
                mask=mask,
                in_group=group,
            )
            for kv, (start, first, mask), group in zip(kvs, self.spans, self.grouped, strict=True)
        ]
        placed.append(Rows(*fresh, mask=self.fresh_mask, causal=self.is_causal))
        return placed


def _is_seen(segment: Segment, span: tuple[int, int, RowMask | None], num_rows: int) -> bool:
    """Whether a column of it is read by a query row."""
    start, first, _ = span
    return start < segment.kv.num_tokens and first < num_rows


def _turn(
    rotation: Rotation, segments: Sequence[Segment], read: Sequence[int], positions: torch.Tensor
) -> Turn:
    """The query's turns to all segments, zeros for those that nobody reads, and to the fresh rows.

    Where documents are read in full, nobody reads any, and angles of all rows to each would take a fifth of
    the time.
    """
    # Fresh keys lie at absolute positions: their turn is the position itself.
    shifts = torch.tensor([*(segments[i].shift for i in read), 0], device=positions.device)
    turn = rotation.turn(positions[None] - shifts[:, None])
    if len(read) == len(segments):
        return turn
    places = torch.tensor([*read, len(segments)], device=positions.device)
    cos, sin = (
        x.new_zeros((len(segments) + 1, *x.shape[1:])).index_copy_(0, places, x) for x in (turn.cos, turn.sin)
    )
    return replace(turn, cos=cos, sin=sin)


def last_turn(turn: Turn | None) -> Turn | None:
    """The turn for the last segment alone."""
    return turn and turn_of(turn, len(turn.cos) - 1)


def turn_of(turn: Turn, i: int) -> Turn:
    """The turn for one segment."""
    return Turn(turn.cos[i : i + 1], turn.sin[i : i + 1], turn.start, turn.interleaved)


def span_of(segment: Segment, window: int | None, positions: torch.Tensor) -> tuple[int, int, RowMask | None]:
    """First column that is read, first query row that reads, and the mask where more is hidden.

    Hidden are columns that a window has left behind, rows that fresh ones stand for, and, to those fresh
    rows, what comes after their own place.
    """
    first = min(segment.first_row, positions.shape[0])
    if first >= positions.shape[0]:
        return 0, first, None
    start = _num_leading(segment.hidden)
    seen_from = None
    if window is not None:
        # columns before this are too far back
        seen_from = (positions[first:] - segment.target - window + 1).clamp_min(0)
        start = min(max(start, int(seen_from.min())), segment.kv.num_tokens)
        if int(seen_from.max()) <= start:
            seen_from = None
    hidden = [i - start for i in segment.hidden if i >= start]
    if seen_from is None and not hidden and not segment.standing:
        return start, first, None
    columns = torch.arange(start, segment.kv.num_tokens, device=positions.device)
    allowed = torch.ones(len(positions) - first, len(columns), dtype=torch.bool, device=positions.device)
    if seen_from is not None:
        allowed &= columns[None] >= seen_from[:, None]
    if hidden:
        allowed[:, hidden] = False
    if segment.standing:
        own = segment.hidden[len(segment.hidden) - segment.standing :][: len(positions) - first]
        allowed[: len(own)] &= columns[None] < torch.tensor(own, device=positions.device)[:, None]
    return start, first, RowMask(allowed)


def _num_leading(hidden: Sequence[int]) -> int:
    """How many of the first rows are hidden without a gap."""
    return next((i for i, row in enumerate(hidden) if row != i), len(hidden))


def fresh_mask(window: int | None, positions: torch.Tensor, earlier: Sequence[int]) -> RowMask | None:
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
