"""Hands segments to the Triton kernels of a stride."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch

from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill import kernel
from kvrag_kernels.strided_prefill.columns import exponents
from kvrag_kernels.strided_prefill.types import Scoring, Strided

_LOG2E = 1.4426950408889634
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TURNED_BYTES = 64 << 20  # turned copies of query rows that the column sums keep at once


@dataclass(frozen=True, slots=True)
class Tiles:
    """How much one program takes at once.

    Attributes:
        rows: packed query rows; a power of two from 16 on.
        columns: keys; a power of two from 16 on.
        warps: of a program.
        stages: loads in flight.
    """

    rows: int = 128
    columns: int = 64
    warps: int = 8
    stages: int = 3

    @staticmethod
    def of(dim: int, dtype: torch.dtype) -> Tiles:
        """What fits the shared memory of an A100 (163 KiB) and, by the compiler's count, the registers."""
        if dtype == torch.float32:
            return Tiles(64, 32, 8, 2) if dim <= 128 else Tiles(16, 32, 8, 2)
        if dim <= 64:
            return Tiles(128, 128, 8, 3)
        return Tiles(128, 64, 8, 3) if dim <= 128 else Tiles(128, 32, 8, 2)


def is_supported(query: torch.Tensor, segments: Sequence[Rows]) -> bool:
    """Whether the kernels can do it: no masks, rows of one dtype whose dimensions lie side by side."""
    return query.dtype in _DTYPES and all(
        (rows.is_open or rows.causal)
        and rows.keys.dtype == rows.values.dtype == query.dtype
        and rows.keys.stride(-1) == rows.values.stride(-1) == 1
        for rows in segments
    )


def segment_table(segments: Sequence[Rows]) -> tuple[torch.Tensor, int]:
    """Where each segment lies, as the kernels read it.

    Returns:
        [S, 10], int64, on the segments' device: offsets are in elements, from the first segment's rows (the
        memory of other segments is reached from there, too); and the largest power of two, up to 16 bytes,
        that divides all addresses and strides, in elements.
    """
    first, table, size = segments[0], [], segments[0].keys.element_size()
    for rows in segments:
        line: list[int] = []
        for x, base in ((rows.keys, first.keys), (rows.values, first.values)):
            line += [(x.data_ptr() - base.data_ptr()) // size if x.numel() else 0]
            line += [x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2)]
        table.append([*line, rows.keys.shape[2], int(rows.causal)])
    apart = [x for line in table for x in line[:8]]
    starts = [first.keys.data_ptr() // size, first.values.data_ptr() // size]
    align = gcd(16 // size, *apart, *starts)
    return torch.tensor(table, dtype=torch.int64).to(first.keys.device, non_blocking=True), align


@lru_cache(maxsize=32)
def _blocks(
    spans: tuple[tuple[int, int, int], ...], lengths: tuple[int, ...], columns: int, device: torch.device
) -> torch.Tensor:
    """[n, 4], int32: the blocks of columns of all spans; the same for all layers, so it is kept."""
    found = []
    for segment, first, last in spans:
        into = sum(lengths[:segment])
        for start in range(first, last, columns):
            found.append((segment, start, min(start + columns, last), into + start))
    return torch.tensor(found, dtype=torch.int32).view(-1, 4).to(device)


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Turning:
    """Angles as the kernels take them, and what is known of them when they are compiled."""

    cos: torch.Tensor
    sin: torch.Tensor
    pairs: int
    start: int
    interleaved: bool

    @staticmethod
    def of(turn: Turn | None, query: torch.Tensor, num_segments: int) -> _Turning:
        if turn is None:
            return _Turning(query, query, 0, 0, False)
        shape = (num_segments, query.shape[2], turn.cos.shape[-1])
        cos, sin = turn.cos.expand(shape).contiguous(), turn.sin.expand(shape).contiguous()
        return _Turning(cos, sin, shape[-1], turn.start, turn.interleaved)

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"PAIRS": self.pairs, "START": self.start, "INTERLEAVED": self.interleaved}


def _scales(scale: float, softcap: float | None) -> tuple[float, float]:
    return (scale * _LOG2E, 1.0) if softcap is None else (scale, softcap)


def strided_prefill_triton(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
    tiles: Tiles | None = None,
) -> Strided:
    """Attend in one launch, score in a second; see `strided_prefill` for the arguments."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, num_rows, dim = query.shape
    first, value_dim = segments[0], segments[0].values.shape[-1]
    kv_heads = first.keys.shape[1]
    out = query.new_empty((batch, heads, num_rows, value_dim))
    lse = query.new_empty((batch, heads, num_rows), dtype=torch.float32)
    part = query.new_empty((len(segments), *lse.shape), dtype=torch.float32)
    table, align = segment_table(segments)
    turning = _Turning.of(turn, query, len(segments))
    use = tiles or Tiles.of(max(dim, value_dim), query.dtype)
    groups = heads // kv_heads
    grid = (-(-num_rows * groups // use.rows), batch * kv_heads)
    kernel.attend[grid](
        query, turning.cos, turning.sin, first.keys, first.values, table,
        query if sinks is None else sinks, out, lse, part,
        query.stride(0), query.stride(1), query.stride(2), len(segments), num_rows, kv_heads,
        *_scales(scale, softcap),
        GROUPS=groups, D=dim, DP=_padded(dim), DV=value_dim, DVP=_padded(value_dim), **turning.constants,
        CAPPED=softcap is not None, SINKS=sinks is not None, ALIGN=align,
        ROWS=use.rows, COLUMNS=use.columns, num_warps=use.warps, num_stages=use.stages,
    )  # fmt: skip
    scores = None
    if scoring is not None:
        scores = column_scores_triton(
            query, segments, turn, lse, scoring, scale=scale, softcap=softcap, tiles=tiles
        )
    return Strided(out, lse, (part - lse).exp_().nan_to_num_(0.0), scores)


def column_scores_triton(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    lse: torch.Tensor,
    scoring: Scoring,
    *,
    scale: float,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Score the columns; see `column_scores` for the arguments.

    Query rows are turned for all segments once and not for each block of columns; so many of them at a time
    that their copies stay small. The launches follow each other, so the order of the additions is fixed.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    _, heads, num_rows, dim = query.shape
    lengths = tuple(rows.keys.shape[2] for rows in segments)
    kv_heads = segments[0].keys.shape[1]
    use = tiles or Tiles.of(dim, query.dtype)
    sums = query.new_zeros((heads, sum(lengths)), dtype=torch.float32)
    blocks = _blocks(tuple(scoring.spans(lengths)), lengths, use.columns, query.device)
    if not len(blocks):
        return sums
    table, align = segment_table(segments)
    turning = _Turning.of(turn, query, len(segments))
    bias = exponents(lse[0], scoring.weights) * _LOG2E
    copies = len(segments) if turn is not None else 1
    step = max(use.rows, _TURNED_BYTES // (copies * heads * dim * query.element_size()))
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        turned = _turned(query, turning, copies, start, count)
        kernel.sum_columns[len(blocks), kv_heads](
            turned, bias, segments[0].keys, table, blocks, sums,
            heads * count * dim if copies > 1 else 0, start, count, num_rows, sum(lengths),
            *_scales(scale, softcap),
            GROUPS=heads // kv_heads, D=dim, DP=_padded(dim), CAPPED=softcap is not None, ALIGN=align,
            ROWS=use.rows, COLUMNS=use.columns,
            num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
    return sums


def _turned(query: torch.Tensor, turning: _Turning, copies: int, start: int, count: int) -> torch.Tensor:
    """[copies, H, count, D]: query rows from `start` on, as each segment sees them."""
    _, heads, num_rows, dim = query.shape
    if not turning.pairs:
        return query[:, :, start : start + count].contiguous()
    turned = query.new_empty((copies, heads, count, dim))
    rows = 32
    kernel.turn_rows[-(-count // rows), heads, copies](
        query, turning.cos, turning.sin, turned, query.stride(1), query.stride(2), start, count, num_rows,
        D=dim, DP=_padded(dim), **turning.constants, ROWS=rows,
    )  # fmt: skip
    return turned
