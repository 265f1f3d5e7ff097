"""A stride on CPU over rows brought together: keys turned to their places once, scores computed once.

A stride over a cascade reads ten runs. Turning the query for each of them touches (runs x query rows x heads)
rows, turning the keys (columns x key heads), which is several times less; and where all columns of some query
rows fit into the processor's own memory, their probabilities are there until the normaliser is known, so that
output, masses and column sums are products with one and the same matrix. Nothing is computed twice.

Where no score is so large that its exponential could overflow, no maximum is looked for either: a softmax is
the same without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.types import Scoring, Strided
from kvrag_kernels.turning import turn_query

_LOG2E = 1.4426950408889634
_CELLS = 1 << 19  # probabilities at once: 2 MiB of float32, a core's own memory
_LEAST_ROWS = 64  # packed query rows in a block: products of fewer are slow
_LARGEST = 80.0  # exponents to base 2 up to which sums and products stay within float32 at both ends
_NOTHING = -1e30
_SAME = 1e-3  # radians; what tables in float32 differ by is a thousand times less


def is_supported(query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None) -> bool:
    """Whether one run can stand for the segments, and is the fastest way.

    Needs one sequence without masks, the stride's own rows last if they are there, few enough columns, and a
    turn that differs between segments by their places alone.
    """
    columns = sum(rows.keys.shape[2] for rows in segments)
    return (
        query.device.type == "cpu"
        and query.shape[0] == 1
        and columns * _LEAST_ROWS <= _CELLS
        and all(rows.is_open for rows in segments[:-1])
        and (segments[-1].is_open or segments[-1].causal)
        and not (torch.is_grad_enabled() and query.requires_grad)
        and (turn is None or _is_by_places(turn))
    )


def strided_prefill_gathered(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attend to the gathered rows; see `strided_prefill` for the arguments."""
    stride = _Stride(query, segments, turn, scale)
    own_sinks = None if sinks is None else (sinks.float() * _LOG2E).view(stride.kv_heads, 1, -1)
    for head, block in stride.blocks():
        stride.attend(head, block, own_sinks, scoring)
    return stride.found(scoring)


@dataclass(frozen=True, slots=True)
class _Block:
    """Query rows `first..end` and the columns that the last of them sees."""

    first: int
    end: int
    columns: int


class _Stride:
    """The gathered rows of a stride, and what comes of attending to them."""

    def __init__(
        self, query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None, scale: float
    ) -> None:
        """Bring rows together and turn them; query rows are scaled to exponents of base 2."""
        self.dtype, self.lengths = query.dtype, [rows.keys.shape[2] for rows in segments]
        self.kv_heads, self.num_rows = segments[0].keys.shape[1], query.shape[2]
        self.groups = query.shape[1] // self.kv_heads
        self.is_causal = segments[-1].causal
        self.num_before = sum(self.lengths[:-1]) if self.is_causal else sum(self.lengths)
        self.keys = _together(segments, turn, self.lengths)
        self.values = _with_masses(segments, self.lengths)
        self.value_size = segments[0].values.shape[3]
        own = query if turn is None else turn_query(query.float(), _of(turn, -1), 1)[0]
        packed = own[0].unflatten(0, (self.kv_heads, self.groups)).transpose(1, 2).float() * (scale * _LOG2E)
        self.query = packed.reshape(self.kv_heads, -1, query.shape[3])  # [K, T * G, D]
        self.is_small = self._largest() <= _LARGEST
        self.sums = self.keys.new_zeros((self.kv_heads, self.groups, sum(self.lengths)))
        width = self.value_size + len(self.lengths)
        self.out = self.keys.new_empty((self.kv_heads, self.num_rows * self.groups, width))
        self.lse = self.keys.new_empty((self.kv_heads, self.num_rows * self.groups))
        self.room = self.keys.new_empty(max(_CELLS, self.groups * sum(self.lengths)))

    def _largest(self) -> float:
        """No exponent's magnitude is larger (Cauchy and Schwarz)."""
        query, keys = (float(x.square().sum(-1).amax()) for x in (self.query, self.keys))
        return math.sqrt(query * keys)

    def blocks(self) -> Iterator[tuple[int, _Block]]:
        """Heads and blocks of query rows whose probabilities fit into the room."""
        step = max(1, _CELLS // (self.groups * sum(self.lengths)))
        step = -(-self.num_rows // -(-self.num_rows // step))  # all of about the same size
        for head in range(self.kv_heads):
            for first in range(0, self.num_rows, step):
                end = min(first + step, self.num_rows)
                columns = self.num_before + (end if self.is_causal else 0)
                yield head, _Block(first, end, columns)

    def attend(self, head: int, block: _Block, sinks: torch.Tensor | None, scoring: Scoring | None) -> None:
        """A key head's query rows of a block: output, masses and log-sum-exp, their part of the sums."""
        rows = slice(block.first * self.groups, block.end * self.groups)
        probs = self.room[: (rows.stop - rows.start) * block.columns].view(-1, block.columns)
        torch.mm(self.query[head, rows], self.keys[head, : block.columns].T, out=probs)
        if self.is_causal:
            self._hide(probs, block)
        level = None if self.is_small else probs.amax(-1, keepdim=True)
        if level is not None:
            probs.sub_(level)
        probs.exp2_()
        out = self.out[head, rows]
        torch.mm(probs, self.values[head, : block.columns], out=out)
        total = out[:, self.value_size :].sum(-1)
        if sinks is not None:
            extra = sinks[head].expand(block.end - block.first, -1).reshape(-1)
            total += (extra if level is None else extra - level[:, 0]).exp2_()
        out /= total[:, None]
        self.lse[head, rows] = total.log2() if level is None else total.log2() + level[:, 0]
        if scoring is not None:
            self._score(head, block, probs, total, scoring)

    def _hide(self, probs: torch.Tensor, block: _Block) -> None:
        """Columns behind a query row's own place; those before the block are seen by all of its rows."""
        size = block.end - block.first
        corner = probs.view(size, self.groups, block.columns)[..., -size:]
        corner += torch.full((size, size), _NOTHING).triu_(1)[:, None]

    def _score(
        self, head: int, block: _Block, probs: torch.Tensor, total: torch.Tensor, scoring: Scoring
    ) -> None:
        """Add weighted probabilities to the wanted columns, each query head of the group for itself."""
        weights = scoring.weights[block.first : block.end, None] / total.view(-1, self.groups)
        by_group = probs.view(-1, self.groups, block.columns)
        for first, last in scoring.columns if scoring.columns is not None else ((0, block.columns),):
            wanted = slice(first, min(last, block.columns))
            for group in range(self.groups) if first < wanted.stop else ():
                self.sums[head, group, wanted].addmv_(by_group[:, group, wanted].T, weights[:, group])

    def found(self, scoring: Scoring | None) -> Strided:
        """Everything in the caller's order."""
        everything = (
            self.out.view(self.kv_heads, self.num_rows, self.groups, -1).transpose(1, 2).flatten(0, 1)
        )
        lse = self.lse.view(self.kv_heads, self.num_rows, self.groups).transpose(1, 2).flatten(0, 1)
        return Strided(
            everything[None, ..., : self.value_size].to(self.dtype).contiguous(),
            lse[None] / _LOG2E,
            everything[..., self.value_size :].movedim(-1, 0)[:, None].contiguous(),
            None if scoring is None else self.sums.flatten(0, 1),
        )


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


def _together(segments: Sequence[Rows], turn: Turn | None, lengths: Sequence[int]) -> torch.Tensor:
    """[K, n, D], float32: all keys, turned so that the last segment's turn of the query is right for each."""
    keys = torch.cat([rows.keys[0] for rows in segments], dim=1).float()
    if turn is None:
        return keys
    counts = torch.tensor(lengths)
    cos, sin = (x.repeat_interleave(counts, dim=0)[None] for x in _between(turn, 0))
    return turn_query(keys[None], Turn(cos, sin, turn.start, turn.interleaved), 1)[0, 0]


def _with_masses(segments: Sequence[Rows], lengths: Sequence[int]) -> torch.Tensor:
    """[K, n, Dv + S], float32: all values, and behind them whose columns they are, so masses come along."""
    first, total = segments[0].values, sum(lengths)
    made = first.new_zeros((first.shape[1], total, first.shape[3] + len(segments)), dtype=torch.float32)
    start = 0
    for i, (rows, count) in enumerate(zip(segments, lengths, strict=True)):
        made[:, start : start + count, : first.shape[3]] = rows.values[0]
        made[:, start : start + count, first.shape[3] + i] = 1
        start += count
    return made
