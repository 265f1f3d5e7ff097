"""Attention over segments, against PyTorch's operators on rows that lie where they should or are moved there.

Bytes are those of keys and values, read once; the fraction is the share of the device's limit, the larger of
bytes by its copy rate and operations by its matrix rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kernels_parts.clock import replayed, turns
from kernels_parts.limits import dtype_of, limits

from kvrag_kernels import AnyRows, Rows, Turn, segment_attention
from kvrag_kernels._backend import backend, has_triton, is_interpreting, using

NAME = "segment"

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a model's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int


LLAMA = Shape("Llama-3.1-8B", 32, 8, 128)
QWEN = Shape("Qwen2.5-7B", 28, 4, 128)
TINY = Shape("tiny", 4, 2, 16)

_FLEX = (65_536, 32)  # rows and segments


class Case:
    """One query over segments that stand behind each other, and the same rows in one run at their places."""

    def __init__(
        self, shape: Shape, num_queries: int, num_rows: int, num_segments: int, device: torch.device
    ) -> None:
        """Make random rows."""
        self.shape, self.num_queries, self.num_segments = shape, num_queries, num_segments
        dtype, made = dtype_of(device), {"device": device, "dtype": dtype_of(device)}
        size = num_rows // num_segments
        self.num_rows = size * num_segments
        self.scale = shape.dim**-0.5
        self.query = torch.randn(1, shape.heads, num_queries, shape.dim, **made)
        rows = [torch.randn(2, 1, shape.kv_heads, size, shape.dim, **made) for _ in range(num_segments)]
        self.segments = [Rows(kv[0], kv[1]) for kv in rows]
        self.keys = torch.cat([kv[0] for kv in rows], 2)
        self.values = torch.cat([kv[1] for kv in rows], 2)
        self._target = torch.arange(num_segments, device=device) * size
        frequencies = 500_000.0 ** (
            -torch.arange(shape.dim // 2, device=device, dtype=torch.float64) * 2 / shape.dim
        )
        positions = self.num_rows + torch.arange(num_queries, device=device)
        angles = (positions[None] - self._target[:, None])[..., None].double() * frequencies
        self.turn = Turn(angles.cos().float(), angles.sin().float())
        moved = self._target.repeat_interleave(size)[:, None].double() * frequencies
        self._cos, self._sin = moved.cos().to(dtype), moved.sin().to(dtype)
        whole = positions[:, None].double() * frequencies
        self._own = whole.cos().to(dtype), whole.sin().to(dtype)
        self.num_bytes = self.keys.nbytes + self.values.nbytes
        self.num_flops = 4 * shape.heads * num_queries * self.num_rows * shape.dim

    def ours(self) -> torch.Tensor:
        """Whatever the engine picks here."""
        return segment_attention(self.query, self.segments, self.turn, scale=self.scale).out

    def contiguous(self) -> torch.Tensor:
        """SDPA over one run that needs no moving: what cannot be had with several documents in any order."""
        query = _rotated(self.query, *self._own)
        return F.scaled_dot_product_attention(
            query, self.keys, self.values, scale=self.scale, enable_gqa=True
        )

    def copied(self) -> torch.Tensor:
        """Keys turned to their places and copied together with the values, then SDPA."""
        keys = torch.cat([rows.keys for rows in self.segments], 2)
        values = torch.cat([rows.values for rows in self.segments], 2)
        keys = _rotated(keys, self._cos, self._sin)
        query = _rotated(self.query, *self._own)
        return F.scaled_dot_product_attention(query, keys, values, scale=self.scale, enable_gqa=True)


def attending(
    query: torch.Tensor, segments: Sequence[AnyRows], turn: Turn, scale: float
) -> Callable[[], object]:
    """Segment attention as it stands in a decode step: over buffers that never move where Triton runs."""
    if query.device.type != "cuda" or backend(query.device) != "triton":
        return lambda: segment_attention(query, segments, turn, scale=scale)
    from kvrag_kernels.segment_attention.launch import StaticAttention  # noqa: PLC0415 - needs Triton

    made = StaticAttention(query, [segments], [turn], scale=scale)
    return lambda: made(query)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _flex(case: Case) -> Callable[[], object] | None:
    """Compiled flex_attention over the contiguous run; None where it is not measured or cannot be compiled.

    Compiling takes longer than everything else, so it is done for one size only.
    """
    if case.query.device.type != "cuda" or (case.num_rows, case.num_segments) != _FLEX:
        return None
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415 - for GPUs only

    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> object:
        query = _rotated(case.query, *case._own)
        return compiled(query, case.keys, case.values, scale=case.scale, enable_gqa=True)

    try:
        run()
    except Exception as error:  # some releases have no kernel for some numbers of heads
        print(f"flex_attention, {case.shape.name}, {case.num_queries} rows: {error}")
        return None
    return run


def _cases(device: torch.device, small: bool) -> Iterator[Case]:
    """One at a time: together they would fill a GPU."""
    if small:
        yield from (Case(TINY, queries, 96, 3, device) for queries in (1, 8))
        return
    sizes = [(rows, n) for rows in (4096, 16_384, 65_536, 131_072) for n in (8, 32, 128)]
    for shape in (LLAMA, QWEN):
        for queries in (1, 64):
            for rows, n in sizes if device.type == "cuda" else [(4096, 8), (4096, 32)]:
                yield Case(shape, queries, rows, n, device)


def run(device: torch.device, small: bool) -> list[Row]:
    """One row per shape, query length, number of rows and of segments."""
    known = limits(device, small)
    rows = []
    for case in _cases(device, small):
        least = known.seconds(case.num_bytes, case.num_flops, case.query.dtype)
        rows.append(_measured(case, device, small, least))
    if small and device.type == "cpu" and has_triton() and is_interpreting():
        rows.append(_interpreted(Case(TINY, 4, 48, 3, device)))
    return rows


def _measured(case: Case, device: torch.device, small: bool, least: float) -> Row:
    """On a GPU all sides are replayed from graphs; what a call of its own costs there is a column, too."""
    sides: dict[str, Callable[[], object]] = {
        "ours": attending(case.query, case.segments, case.turn, case.scale),
        "contiguous": case.contiguous,
        "copied": case.copied,
    }
    if not small and (flex := _flex(case)) is not None:
        sides["flex"] = flex
    sides = {name: replayed(run, device) for name, run in sides.items()}
    if device.type == "cuda":
        sides["called"] = case.ours
    found = turns(sides, device, repeat=2 if small else (30 if device.type == "cuda" else 7))
    row = {
        "shape": case.shape.name,
        "backend": backend(device),
        "queries": case.num_queries,
        "rows": case.num_rows,
        "segments": case.num_segments,
        "us": found["ours"] * 1e6,
        "GB/s": case.num_bytes / found["ours"] / 1e9,
        "of the limit": least / found["ours"],
        "SDPA, one run / ours": found["contiguous"] / found["ours"],
        "rotate, copy, SDPA / ours": found["copied"] / found["ours"],
    }
    if "flex" in found:
        row["flex_attention / ours"] = found["flex"] / found["ours"]
    if "called" in found:
        row["called from Python, us"] = found["called"] * 1e6
    return row


def _interpreted(case: Case) -> Row:
    """The kernel itself in Triton's interpreter, compared with the path for the CPU; no speed is meant."""
    with using("triton"):
        found = case.ours()
    away = (found - case.ours()).abs().max() / found.abs().max()
    return {
        "shape": case.shape.name,
        "backend": "triton, interpreted",
        "queries": case.num_queries,
        "rows": case.num_rows,
        "segments": case.num_segments,
        "error": float(away),
    }
