"""Runs the kernel: once over a list of segments, or again and again over buffers that never move."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from kvrag_kernels.quantise import width
from kvrag_kernels.segment_attention.forms import AnyRows, num_kv_heads
from kvrag_kernels.segment_attention.kernel import attend_kernel, merge_kernel
from kvrag_kernels.segment_attention.reference import acting
from kvrag_kernels.segment_attention.table import Table, table_of, value_size
from kvrag_kernels.segment_attention.types import Attended, Group
from kvrag_kernels.turning import Turn

_LOG2_E = 1.4426950408889634
_FORMS = {None: 0, "fp8": 1, "int8": 2, "int4": 3}
_BLOCK_BYTES = 16_384  # of keys
_PACKED_ELEMENTS = 4096
_PROCESSORS_OF_THE_INTERPRETER = 4


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut; every choice gives the same result to rounding.

    Attributes:
        queries: packed query rows of a program, a power of two from 16.
        block: rows of keys read at once, a power of two from 16.
        splits: programs that share the rows of one key head and block of queries; at least 2 with a group.
        merged: packed query rows of a program of the second kernel, a power of two.
        warps: of a program.
        stages: blocks under way at once.
    """

    queries: int
    block: int
    splits: int
    merged: int = 1
    warps: int = 4
    stages: int = 3


def tuning_for(
    query: torch.Tensor,
    kv_heads: int,
    dim: int,
    longest: int,
    num_segments: int,
    *,
    grouped: bool,
    packed: bool = False,
    masked: bool = False,
    processors: int | None = None,
) -> Tuning:
    """Sizes that fill the device: as many programs as it runs at once, each with whole blocks to read.

    Where unpacking, many query rows or long ones want more registers than four warps have, a program has
    eight, and is the only one on its multiprocessor: `benchmarks/kernels_parts/compiled.py` counts what is
    used and spilled.

    Args:
        query: [B, H, T, D].
        kv_heads: K.
        dim: the larger of the sizes of a key and a value.
        longest: rows of the longest request, at most.
        num_segments: S; every segment may leave a block unfinished.
        grouped: whether a context group acts.
        packed: whether rows lie in fewer bits.
        masked: whether there are masks.
        processors: multiprocessors of the device; None: those of the query's.
    """
    batch, heads, num_rows, _ = query.shape
    queries = min(32 if packed else 64, max(16, _power(heads // kv_heads * num_rows)))
    is_alone = packed or queries == 64 or dim > 128
    is_narrow = masked and queries == 64
    elements = _PACKED_ELEMENTS if packed else _BLOCK_BYTES // query.element_size() // (2 if is_narrow else 1)
    block = min(128, max(16, elements // _power(dim)))
    others = batch * kv_heads * -(-heads // kv_heads * num_rows // queries)
    programs = (1 if is_alone else 2) * (processors or _processors(query.device))
    splits = max(1, min(programs // max(1, others), -(-longest // block) + num_segments))
    merged = 1 if queries == 16 and query.is_cuda else 8
    return Tuning(
        queries,
        block,
        max(2, splits) if grouped else splits,
        merged,
        warps=8 if is_alone else 4,
        stages=6 if packed else 4 if is_narrow else 3,
    )


class StaticAttention:
    """Segment attention whose buffers never move, so that its two launches can stand in a CUDA graph.

    The grid depends on shapes alone; how many rows each segment has is read from `lengths` by the kernel
    itself. Between two runs the caller may write to `lengths`, `cos` and `sin`, and to the rows.

    Attributes:
        table: where the rows lie.
        lengths: [B, S], int32, on the device: rows of each segment, in the places of `table.order`; no more
            than the segments were made with.
        cos: [B or 1, S, T, R], float32: the query's turn for each segment as the caller numbers them.
        sin: the same.
    """

    def __init__(
        self,
        query: torch.Tensor,
        tables: Sequence[Sequence[AnyRows]],
        turns: Sequence[Turn | None],
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        group: Group | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Lay out tables, results and what lies between.

        Args:
            query: any of the shape, type and device that it is to run with.
            tables: segments of each of B requests, or one list for all of them.
            turns: as many as tables, or one for all; all of them rotated alike.
            scale: see `segment_attention`.
            softcap: see `segment_attention`.
            sinks: see `segment_attention`.
            group: see `segment_attention`.
            tuning: None: chosen by shapes.
        """
        every = [rows for segments in tables for rows in segments]
        self._shape, self._group = query.shape, acting(group, every)
        self._scale, self._softcap, self._sinks = scale, softcap, sinks
        self.table: Table = table_of(tables, query.shape[0], self._group)
        self.lengths = self.table.lengths
        self._kv_heads, self._value_size = num_kv_heads(every[0]), value_size(every[0])
        self._places = self.lengths.shape[1]
        self._turn = turns[0]
        self.cos, self.sin = _joined_turns(turns, self.table.num_slots, query)
        self.tuning = tuning or tuning_for(
            query,
            self._kv_heads,
            max(query.shape[-1], self._value_size),
            self.table.longest,
            self._places,
            grouped=self._group is not None,
            packed=self.table.form is not None,
            masked=self.table.has_masks,
        )
        batch, heads, num_rows, _ = query.shape
        rows = heads // self._kv_heads * num_rows
        lead = (batch * self._kv_heads, self.tuning.splits)
        self._partial = _single((*lead, rows, self._value_size), query.device)
        self._split = _single((*lead, rows), query.device)
        self._pieces = _single((lead[0], self._places + lead[1], rows), query.device)
        self.out = torch.empty(
            (batch, heads, num_rows, self._value_size), dtype=query.dtype, device=query.device
        )
        self.mass = _single((self.table.num_slots, batch, heads, num_rows), query.device)
        self.lse = _single((batch, heads, num_rows), query.device)

    def __call__(self, query: torch.Tensor) -> Attended:
        """Attend.

        Args:
            query: [B, H, T, D], channels side by side.

        Returns:
            The same three tensors every time, overwritten by the next run. Where a request has fewer segments
            than another, nothing is written for those that it lacks.
        """
        if query.shape != self._shape:
            raise ValueError(f"made for a query of {tuple(self._shape)}, not {tuple(query.shape)}")
        with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
            self._attend(query)
            self._merge(query)
        return Attended(self.out, self.mass, self.lse)

    def _attend(self, query: torch.Tensor) -> None:
        batch, heads, num_rows, dim = query.shape
        table, tuning, turn = self.table, self.tuning, self._turn
        groups = heads // self._kv_heads
        local = table.local
        factor, group_factor, cap = self._factors()
        grid = (-(-groups * num_rows // tuning.queries), batch * self._kv_heads, tuning.splits)
        attend_kernel[grid](
            query,
            self.cos,
            self.sin,
            local.cos if local is not None else self.cos,
            local.sin if local is not None else self.sin,
            table.lines,
            self.lengths,
            self._partial,
            self._split,
            self._pieces,
            *query.stride()[:3],
            self.cos.stride(0) if self.cos.shape[0] > 1 else 0,
            self._places,
            table.num_grouped,
            num_rows,
            self._kv_heads,
            table.page,
            local.cos.shape[1] if local is not None else 0,
            factor,
            group_factor,
            cap,
            G=groups,
            D=dim,
            DV=self._value_size,
            DP=max(16, _power(dim)),
            DVP=max(16, _power(self._value_size)),
            R=self.cos.shape[-1],
            START=turn.start if turn is not None else 0,
            INTERLEAVED=turn is not None and turn.interleaved,
            ROTATED=turn is not None,
            SOFTCAP=self._softcap is not None,
            GROUPED=self._group is not None,
            MASKED=table.has_masks,
            PAGED=table.page > 0,
            FORM=_FORMS[table.form],
            VALUE_WIDTH=width(self._value_size),
            ALIGNED=16 // query.element_size() if table.is_aligned else 0,
            SP=_power(self._places),
            BM=tuning.queries,
            BN=tuning.block,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )

    def _factors(self) -> tuple[float, float, float]:
        """Factors on scores outside and inside the group, and on what a soft cap's tangent takes."""
        factor, cap = self._scale * _LOG2_E, 1.0
        if self._softcap is not None:
            factor, cap = self._softcap * _LOG2_E, self._scale / self._softcap
        return factor, factor / self._group.temperature if self._group is not None else factor, cap

    def _merge(self, query: torch.Tensor) -> None:
        batch, heads, num_rows, _ = query.shape
        groups, splits = heads // self._kv_heads, self.tuning.splits
        size = max(16, _power(self._value_size))
        places = _power(self._places)
        merged = self.tuning.merged
        merge_kernel[(-(-groups * num_rows // merged), batch * self._kv_heads)](
            self._partial,
            self._split,
            self._pieces,
            self.table.lines,
            self.lengths,
            self._sinks if self._sinks is not None else self._split,
            self.out,
            self.mass,
            self.lse,
            self._places,
            self.table.num_grouped,
            groups * num_rows,
            self._kv_heads,
            splits,
            num_rows,
            self._group.scale * self._group.temperature - 1 if self._group is not None else 0.0,
            G=groups,
            DV=self._value_size,
            DVP=size,
            HAS_SINKS=self._sinks is not None,
            GROUPED=self._group is not None,
            SP=places,
            PP=_power(splits),
            PB=min(_power(splits), max(1, 4096 // (size * merged))),
            JB=min(8, max(1, 2048 // (places * merged))),
            RB=merged,
            BN=self.tuning.block,
            num_warps=4,
        )


def attend_many(
    query: torch.Tensor,
    tables: Sequence[Sequence[AnyRows]],
    turns: Sequence[Turn | None],
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    group: Group | None,
) -> list[Attended]:
    """Several requests in one launch; see `segment_attention_many`."""
    run = StaticAttention(query, tables, turns, scale=scale, softcap=softcap, sinks=sinks, group=group)
    run(query)
    return [
        Attended(run.out[i : i + 1], run.mass[: len(segments), i : i + 1], run.lse[i : i + 1])
        for i, segments in enumerate(tables)
    ]


def _joined_turns(
    turns: Sequence[Turn | None], num_slots: int, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B or 1, S, T, R] of every request's [S, T, R]; something to point to where nothing is rotated."""
    found = [turn for turn in turns if turn is not None]
    if not found:
        nothing = torch.zeros((1, 1, 1, 1), dtype=torch.float32, device=query.device)
        return nothing, nothing
    if len(found) != len(turns):
        raise ValueError("either all requests of a layer are rotated or none is")
    return _stacked([t.cos for t in found], num_slots), _stacked([t.sin for t in found], num_slots)


def _stacked(tables: Sequence[torch.Tensor], num_slots: int) -> torch.Tensor:
    if len(tables) == 1:
        return tables[0].contiguous()[None]
    joined = tables[0].new_zeros((len(tables), num_slots, *tables[0].shape[1:]))
    for into, table in zip(joined, tables, strict=True):
        into[: len(table)] = table
    return joined


def _single(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS_OF_THE_INTERPRETER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
