"""Attention on CPU over rows brought together: keys turned to their places once, scores computed once.

Turning the query for every segment touches (segments x query rows x heads) rows, turning the keys (columns x
key heads), which is less where segments are short or query rows many. And where all columns of some query
rows fit into the processor's own memory, their probabilities are there until the normaliser is known, so that
output, masses and whatever else is wanted of them come from one and the same matrix. Nothing is computed
twice.

Where no score is so large that its exponential could overflow, no maximum is looked for either: a softmax is
the same without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch

from kvrag_kernels.segment_attention.reference import acting
from kvrag_kernels.segment_attention.types import Attended, Group, Rows, Turn
from kvrag_kernels.turning import turn_into, turn_query

_LOG2E = 1.4426950408889634
_CELLS = 1 << 19  # probabilities at once: 2 MiB of float32, a core's own memory
_LEAST_ROWS = 64  # packed query rows in a block: products of fewer are slow
_MOST_ELEMENTS = 1 << 20  # of the keys of some heads: more in new memory costs more than its use
_MOST_RIDING = 16  # segments whose masses ride along as columns of the values
_LARGEST = 80.0  # exponents to base 2 up to which sums and products stay within float32 at both ends
_NOTHING = -1e30
_SAME = 1e-3  # radians; what tables in float32 differ by is a thousand times less

# Where it was faster than segment by segment: benchmarks/LOG.md has the table.
_LEAST_PACKED = 64  # query rows, those of a group counted apiece
_LEAST_SHARE = 1.2  # the same for each row of a segment, on the average
_SHORT = 160  # rows of a segment, on the average
_MOST_UNSEEN = 8  # the part of all products that may be computed in vain: one of so many

Wanted = Callable[[int, "Block", torch.Tensor, torch.Tensor], None]
"""Takes a key head, a block, its exponentials [t * G, columns], and what divides them, [t * G]."""


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows `first..end` and the columns that the last of them sees."""

    first: int
    end: int
    columns: int


def is_supported(query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None) -> bool:
    """Whether one run can stand for the segments.

    Needs one sequence without masks, the fresh rows last if they are there, no query row that sees nothing,
    few enough columns, and a turn that differs between segments by their places alone.
    """
    columns = sum(rows.keys.shape[2] for rows in segments)
    return (
        query.device.type == "cpu"
        and query.shape[0] == 1
        and columns * _LEAST_ROWS <= _CELLS
        and all(rows.mask is None and not rows.causal for rows in segments[:-1])
        and segments[-1].mask is None
        and any(rows.causal or (rows.first_row == 0 and rows.keys.shape[2]) for rows in segments)
        and not (torch.is_grad_enabled() and query.requires_grad)
        and (turn is None or _is_by_places(turn))
    )


def is_faster(query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None, group: Group | None) -> bool:
    """Whether that is possible and faster than segment by segment: many query rows over short segments."""
    num_rows, columns = query.shape[2], sum(rows.keys.shape[2] for rows in segments)
    unseen = sum(min(rows.first_row, num_rows) * rows.keys.shape[2] for rows in segments)
    packed = query.shape[1] // segments[0].keys.shape[1] * num_rows
    return (
        packed >= _LEAST_PACKED
        and packed * len(segments) >= _LEAST_SHARE * columns
        and columns <= _SHORT * len(segments)
        and _MOST_UNSEEN * unseen <= num_rows * columns
        and acting(group, segments) is None
        and query.dtype == torch.float32
        and is_supported(query, segments, turn)
    )


def segment_attention_gathered(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> Attended:
    """Attend to the gathered rows; see `segment_attention` for the arguments."""
    gathered = Gathered(query, segments, turn, scale)
    gathered.attend(sinks)
    return gathered.attended()


class Gathered:
    """The rows of all segments, and what comes of attending to them.

    Attributes:
        groups: query heads of a key head.
        lengths: of the segments.
    """

    def __init__(
        self, query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None, scale: float
    ) -> None:
        """Turn the query to the last segment's place, and scale it to exponents of base 2."""
        self.lengths = [rows.keys.shape[2] for rows in segments]
        self.groups = query.shape[1] // segments[0].keys.shape[1]
        self._segments, self._turn, self._dtype = segments, turn, query.dtype
        self._kv_heads, self._num_rows = segments[0].keys.shape[1], query.shape[2]
        self._is_causal = segments[-1].causal
        self._ends = list(accumulate(self.lengths))
        self._num_columns = self._ends[-1]
        self._num_before = self._num_columns - (self.lengths[-1] if self._is_causal else 0)
        self._value_size = segments[0].values.shape[3]
        own = query if turn is None else turn_query(query.float(), _of(turn, -1), 1)[0]
        packed = own[0].unflatten(0, (self._kv_heads, self.groups)).transpose(1, 2).float() * (scale * _LOG2E)
        self._query = packed.reshape(self._kv_heads, -1, query.shape[3])  # [K, T * G, D]
        new = self._query.new_empty
        self._riding = len(segments) if len(segments) <= _MOST_RIDING else 0
        self._most = max(1, min(self._kv_heads, _MOST_ELEMENTS // (self._num_columns * query.shape[3])))
        self._keys = new((self._most, self._num_columns, query.shape[3]))
        width = self._value_size + self._riding
        self._values = new((self._most, self._num_columns, width))
        self._mark()
        shape = (self._kv_heads, self._num_rows * self.groups)
        self._out = new((*shape, width))
        self._mass = new((*shape, len(segments)))
        self._lse = new(shape)
        self._room = new(max(_CELLS, self.groups * self._num_columns))

    def attend(self, sinks: torch.Tensor | None, wanted: Wanted | None = None) -> None:
        """Attend, key head by key head.

        Args:
            sinks: [H], extra scores.
            wanted: takes the exponentials of every block before they are overwritten.
        """
        own_sinks = None if sinks is None else (sinks.float() * _LOG2E).view(self._kv_heads, -1)
        highest_sink = 0.0 if own_sinks is None else float(own_sinks.abs().amax())
        for first in range(0, self._kv_heads, self._most):
            heads = range(first, min(first + self._most, self._kv_heads))
            self._bring(slice(heads.start, heads.stop))
            keys, values = self._keys[: len(heads)], self._values[: len(heads)]
            is_small = max(highest_sink, _largest(self._query[heads.start : heads.stop], keys)) <= _LARGEST
            for head, own_keys, own_values in zip(heads, keys, values, strict=True):
                for block in self._blocks():
                    sink = None if own_sinks is None else own_sinks[head]
                    probs, total = self._attended(head, block, own_keys, own_values, sink, is_small)
                    if wanted is not None:
                        wanted(head, block, probs, total)

    def attended(self) -> Attended:
        """Everything in the caller's order."""
        parted = (self._kv_heads, self._num_rows, self.groups)
        out, mass = (
            x.view(*parted, -1).transpose(1, 2).flatten(0, 1)
            for x in (self._out[..., : self._value_size], self._mass)
        )
        lse = self._lse.view(parted).transpose(1, 2).flatten(0, 1)
        return Attended(
            out[None].to(self._dtype).contiguous(),
            mass.movedim(-1, 0)[:, None].contiguous(),
            lse[None] / _LOG2E,
        )

    def _mark(self) -> None:
        """Behind the values: whose columns they are, so that masses come along with the output."""
        if self._riding:
            marks = self._values[..., self._value_size :].zero_()
            for i, (end, length) in enumerate(zip(self._ends, self.lengths, strict=True)):
                marks[:, end - length : end, i] = 1

    def _bring(self, heads: slice) -> None:
        """Some heads' rows, keys turned so that the last segment's turn of the query is right for each."""
        turns = None if self._turn is None else _between(self._turn, 0)
        for i, (rows, end, length) in enumerate(zip(self._segments, self._ends, self.lengths, strict=True)):
            columns, some = slice(end - length, end), slice(heads.stop - heads.start)
            keys = rows.keys[0, heads]
            if self._turn is not None and turns is not None and i + 1 < len(self._segments):
                turn_into(self._keys[some, columns], keys.float(), turns[0][i], turns[1][i], self._turn)
            else:
                self._keys[some, columns] = keys
            self._values[some, columns, : self._value_size] = rows.values[0, heads]

    def _blocks(self) -> Iterator[Block]:
        """Blocks of query rows whose probabilities fit into the room."""
        step = max(1, _CELLS // (self.groups * self._num_columns))
        step = -(-self._num_rows // -(-self._num_rows // step))  # all of about the same size
        for first in range(0, self._num_rows, step):
            end = min(first + step, self._num_rows)
            yield Block(first, end, self._num_before + (end if self._is_causal else 0))

    def _attended(
        self,
        head: int,
        block: Block,
        keys: torch.Tensor,
        values: torch.Tensor,
        sink: torch.Tensor | None,
        is_small: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A key head's query rows of a block; the exponentials and what divides them."""
        rows = slice(block.first * self.groups, block.end * self.groups)
        probs = self._room[: (rows.stop - rows.start) * block.columns].view(-1, block.columns)
        torch.mm(self._query[head, rows], keys[: block.columns].T, out=probs)
        self._hide(probs, block)
        extra = None if sink is None else sink.expand(block.end - block.first, -1).reshape(-1)
        level = None if is_small else probs.amax(-1, keepdim=True)
        if level is not None and extra is not None:
            level = torch.maximum(level, extra[:, None])
        if level is not None:
            probs.sub_(level)
        probs.exp2_()
        out = self._out[head, rows]
        torch.mm(probs, values[: block.columns], out=out)
        mass = out[:, self._value_size :] if self._riding else self._sums(probs)
        total = mass.sum(-1)
        if extra is not None:  # never in place: it may be the sinks themselves
            total += (extra if level is None else extra - level[:, 0]).exp2()
        torch.div(mass, total[:, None], out=self._mass[head, rows])
        out /= total[:, None]
        self._lse[head, rows] = total.log2() if level is None else total.log2() + level[:, 0]
        return probs, total

    def _hide(self, probs: torch.Tensor, block: Block) -> None:
        """Columns of segments that come after a row, and behind its own place.

        Columns before the block are seen by all of its rows.
        """
        for rows, end, length in zip(self._segments, self._ends, self.lengths, strict=True):
            if rows.first_row > block.first:
                probs[: (rows.first_row - block.first) * self.groups, end - length : end] = _NOTHING
        if self._is_causal:
            size = block.end - block.first
            corner = probs.view(size, self.groups, block.columns)[..., -size:]
            corner += torch.full((size, size), _NOTHING).triu_(1)[:, None]

    def _sums(self, probs: torch.Tensor) -> torch.Tensor:
        """[t * G, S]: of each segment's columns."""
        starts = [end - length for end, length in zip(self._ends, self.lengths, strict=True)]
        # Of an empty segment NumPy would return the element behind it.
        there = [i for i, start in enumerate(starts) if self.lengths[i] and start < probs.shape[1]]
        found = torch.from_numpy(
            numpy.add.reduceat(probs.numpy(), [starts[i] for i in there], axis=1, dtype=numpy.float32)
        )
        if len(there) == len(starts):
            return found
        every = probs.new_zeros((len(probs), len(starts)))
        every[:, there] = found
        return every


def _largest(query: torch.Tensor, keys: torch.Tensor) -> float:
    """No exponent's magnitude is larger (Cauchy and Schwarz)."""
    return math.sqrt(float(query.square().sum(-1).amax()) * float(keys.square().sum(-1).amax()))


def _of(turn: Turn, i: int) -> Turn:
    """The turn for one segment."""
    return Turn(turn.cos[i][None], turn.sin[i][None], turn.start, turn.interleaved)


def _between(turn: Turn, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [S, R], of how much further the last segment is from a query row than each is."""
    cos, sin = turn.cos[:, row], turn.sin[:, row]
    return cos[-1] * cos + sin[-1] * sin, sin[-1] * cos - cos[-1] * sin


def _is_by_places(turn: Turn) -> bool:
    """Whether segments lie apart by the same angles for the first and the last query row."""
    first, last = _between(turn, 0), _between(turn, -1)
    return all(torch.allclose(a, b, rtol=0, atol=_SAME) for a, b in zip(first, last, strict=True))
