"""Moving rows in Triton: read them where they lie and turn them; then write them where they go."""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of the table of tensors, [J, 12] int64; offsets and strides are in elements.
HELD, HELD_HEAD, HELD_ROW, FRESH, FRESH_HEAD, FRESH_ROW = (tl.constexpr(i) for i in range(6))
INTO, INTO_HEAD, INTO_ROW, SOURCE, SPIN, IS_TURNED = (tl.constexpr(i) for i in range(6, 12))
FIELDS = tl.constexpr(12)


@triton.jit(do_not_specialize=["num_moved", "num_before"])
def gather_rows(
    base, table, sources, source_head, slots, frequencies, taken, num_moved, num_before,
    D: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows as they are to lie in their slots, [J, K, m, D]. Grid: (blocks of rows, heads, tensors)."""
    head, job = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = table + job * FIELDS
    i, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    valid = i < num_moved
    source = tl.load(sources + tl.load(row + SOURCE) + head * source_head + i, mask=valid, other=0)
    is_fresh = source >= num_before
    held_row = tl.multiple_of(tl.load(row + HELD_ROW), ALIGN)
    fresh_row = tl.multiple_of(tl.load(row + FRESH_ROW), ALIGN)
    held = tl.multiple_of(tl.load(row + HELD) + head * tl.load(row + HELD_HEAD), ALIGN)
    fresh = tl.multiple_of(tl.load(row + FRESH) + head * tl.load(row + FRESH_HEAD), ALIGN)
    at = tl.where(is_fresh, fresh + (source - num_before) * fresh_row, held + source * held_row)
    at = tl.multiple_of(at, ALIGN)
    exists = valid[:, None] & (d < D)[None, :]
    x = tl.load(base + at[:, None] + d[None, :], mask=exists, other=0.0)
    if PAIRS > 0:
        e = d - START
        if INTERLEAVED:
            pair, other, is_first = e >> 1, START + (e ^ 1), (e & 1) == 0
        else:
            is_first = e < PAIRS
            pair = tl.where(is_first, e, e - PAIRS)
            other = tl.where(is_first, d + PAIRS, d - PAIRS)
        is_rotated = (e >= 0) & (e < 2 * PAIRS)
        rotated = valid[:, None] & is_rotated[None, :]
        y = tl.load(base + at[:, None] + other[None, :], mask=rotated, other=0.0).to(tl.float32)
        lies = tl.where(is_fresh | (tl.load(row + IS_TURNED) == 0), 0, source)
        distance = (tl.load(slots + i, mask=valid, other=0) - lies).to(tl.float64)
        # Whole turns are taken off in float64; what is left is as good in float32.
        turns = tl.load(frequencies + tl.load(row + SPIN) + pair, mask=is_rotated, other=0.0)
        share = distance[:, None] * turns[None, :]
        angle = ((share - tl.floor(share + 0.5)) * 6.283185307179586).to(tl.float32)
        sin = tl.where(is_first[None, :], -tl.sin(angle), tl.sin(angle))
        x = tl.where(rotated, (x.to(tl.float32) * tl.cos(angle) + y * sin).to(x.dtype), x)
    into = (job * tl.num_programs(1) + head) * num_moved + i
    tl.store(taken + into[:, None] * D + d[None, :], x, mask=exists)


@triton.jit(do_not_specialize=["num_moved"])
def scatter_rows(
    base, table, slots, taken, num_moved,
    D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes gathered rows to their slots. Grid: (blocks of rows, heads, tensors)."""
    head, job = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = table + job * FIELDS
    i, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    valid = i < num_moved
    exists = valid[:, None] & (d < D)[None, :]
    come = (job * tl.num_programs(1) + head) * num_moved + i
    x = tl.load(taken + come[:, None] * D + d[None, :], mask=exists, other=0.0)
    into = tl.multiple_of(tl.load(row + INTO) + head * tl.load(row + INTO_HEAD), ALIGN)
    into_row = tl.multiple_of(tl.load(row + INTO_ROW), ALIGN)
    at = into + tl.load(slots + i, mask=valid, other=0) * into_row
    tl.store(base + at[:, None] + d[None, :], x, mask=exists)
