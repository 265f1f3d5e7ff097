"""The stride's attention in Triton: one pass over all segments, and a second one for the column sums.

Segments are rows of a table of element offsets, strides and lengths: how many there are, how long they are
and where they lie is data, and nothing is compiled anew for it. Names: r packed rows (query row times group
plus head in the group, so that the heads of a group share what is loaded), t query rows, c columns, d and dv
dimensions. Exponents are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of the table of segments, [S, 10] int64.
KEY, KEY_BATCH, KEY_HEAD, KEY_ROW = (tl.constexpr(i) for i in range(4))
VALUE, VALUE_BATCH, VALUE_HEAD, VALUE_ROW = (tl.constexpr(i) for i in range(4, 8))
LENGTH, CAUSAL, FIELDS = (tl.constexpr(i) for i in range(8, 11))

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(scores, scale, cap, CAPPED: tl.constexpr):
    """Scores to base 2: cap * tanh(score / cap), by way of exp, or the scaled score.

    `scale` has log2(e) in it only where there is no cap.
    """
    if CAPPED:
        e = tl.exp2(tl.abs(scores * scale) * (-2.0 / cap * LOG2E))
        squeezed = cap * LOG2E * ((1 - e) / (1 + e))
        return tl.where(scores * scale < 0, -squeezed, squeezed)
    return scores * scale


@triton.jit
def turned_rows(
    query, cos, sin, q_rows, angle_rows, valid,
    D: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """[r, DP]: query rows, rotated in float32 and rounded once, zero behind D.

    `q_rows` and `angle_rows`, [r] int64, say where each row and its angles begin; `valid` which rows exist.
    """
    d = tl.arange(0, DP)
    exists = valid[:, None] & (d < D)[None, :]
    x = tl.load(query + q_rows[:, None] + d[None, :], mask=exists, other=0.0)
    if PAIRS > 0:
        e = d - START
        if INTERLEAVED:
            pair, other, is_first = e >> 1, START + (e ^ 1), (e & 1) == 0
        else:
            is_first = e < PAIRS
            pair = tl.where(is_first, e, e - PAIRS)
            other = tl.where(is_first, d + PAIRS, d - PAIRS)
        rotated = valid[:, None] & ((e >= 0) & (e < 2 * PAIRS))[None, :]
        y = tl.load(query + q_rows[:, None] + other[None, :], mask=rotated, other=0.0)
        at = angle_rows[:, None] + pair[None, :]
        c = tl.load(cos + at, mask=rotated, other=1.0)
        s = tl.load(sin + at, mask=rotated, other=0.0)
        s = tl.where(is_first[None, :], -s, s)
        x = (x.to(tl.float32) * c + y.to(tl.float32) * s).to(x.dtype)
    return x


@triton.jit
def read_columns(
    acc, top, total, part, q, keys, values, key_row, value_row, first, last, length, is_causal, t, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns first..last of one segment, added to the running softmax of packed rows.

    `acc` [r, DVP] holds the values times their exponentials, `top` [r] the largest score, `total` [r] the sum
    of exponentials, and `part` [r] that of this segment alone.
    """
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    for start in range(first, last, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        k_at = keys + c[None, :] * key_row + d[:, None]
        v_at = values + c[:, None] * value_row + dv[None, :]
        if MASKED:
            k = tl.load(k_at, mask=(c < length)[None, :] & (d < D)[:, None], other=0.0)
        elif D < DP:
            k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
        else:
            k = tl.load(k_at)
        scores = capped(tl.dot(q, k, input_precision="ieee"), scale, cap, CAPPED)
        if MASKED:
            seen = (c < length)[None, :] & ((c[None, :] <= t[:, None]) | (is_causal == 0))
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet
        p = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        new = tl.sum(p, 1)
        total, part, top = total * shrink + new, part * shrink + new, higher
        if MASKED:
            v = tl.load(v_at, mask=(c < length)[:, None] & (dv < DV)[None, :], other=0.0)
        elif DV < DVP:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total, part


@triton.jit
def log_sum(top, total):
    """Natural log-sum-exp; minus infinity where nothing was seen."""
    seen = total > 0
    return tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))


@triton.jit(do_not_specialize=["num_segments", "num_rows"])
def attend(
    query, cos, sin, keys, values, table, sinks, out, lse, part_lse,
    q_batch, q_head, q_row, num_segments, num_rows, kv_heads, scale, cap,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PAIRS: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exps of ROWS packed rows of one key head of one sequence.

    Grid: (blocks of packed rows, sequences * key heads).
    """
    SIZE: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    r = block * ROWS + tl.arange(0, ROWS)
    t, valid = r // GROUPS, r < num_rows * GROUPS
    head = kv_head * GROUPS + r % GROUPS
    t_first = block * ROWS // GROUPS
    t_end = tl.minimum((block * ROWS + ROWS - 1) // GROUPS + 1, num_rows)
    q_rows = batch * q_batch + head * q_head + t.to(tl.int64) * q_row
    flat = (batch * kv_heads * GROUPS + head) * num_rows + t  # of [B, H, T]
    num_flat = tl.num_programs(1).to(tl.int64) * GROUPS * num_rows

    acc = tl.zeros((ROWS, DVP), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for s in range(num_segments):
        row = table + s * FIELDS
        length = tl.load(row + LENGTH).to(tl.int32)
        is_causal = tl.load(row + CAUSAL).to(tl.int32)
        # What all rows of the block see, and what any of them sees.
        all_see = tl.where(is_causal != 0, tl.minimum(t_first + 1, length), length)
        any_sees = tl.where(is_causal != 0, tl.minimum(t_end, length), length)
        middle = all_see // COLUMNS * COLUMNS
        key_row = tl.multiple_of(tl.load(row + KEY_ROW), ALIGN)
        value_row = tl.multiple_of(tl.load(row + VALUE_ROW), ALIGN)
        k_offset = tl.load(row + KEY) + batch * tl.load(row + KEY_BATCH) + kv_head * tl.load(row + KEY_HEAD)
        v_offset = (
            tl.load(row + VALUE) + batch * tl.load(row + VALUE_BATCH) + kv_head * tl.load(row + VALUE_HEAD)
        )
        # Said of the pointers, in bytes; said of the offsets, the compiler would forget it.
        k = tl.multiple_of(keys + k_offset, ALIGN * SIZE)
        v = tl.multiple_of(values + v_offset, ALIGN * SIZE)
        angle_rows = (t.to(tl.int64) + s * num_rows) * PAIRS
        q = turned_rows(query, cos, sin, q_rows, angle_rows, valid, D, DP, PAIRS, START, INTERLEAVED)
        part = tl.zeros((ROWS,), tl.float32)
        acc, top, total, part = read_columns(
            acc, top, total, part, q, k, v, key_row, value_row, 0, middle, length, is_causal, t,
            scale, cap, D, DP, DV, DVP, COLUMNS, CAPPED, False,
        )  # fmt: skip
        acc, top, total, part = read_columns(
            acc, top, total, part, q, k, v, key_row, value_row, middle, any_sees, length, is_causal, t,
            scale, cap, D, DP, DV, DVP, COLUMNS, CAPPED, True,
        )  # fmt: skip
        tl.store(part_lse + s * num_flat + flat, log_sum(top, part), mask=valid)

    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        acc, total, top = acc * shrink[:, None], total * shrink + tl.exp2(sink - higher), higher
    dv = tl.arange(0, DVP)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + flat[:, None] * DV + dv[None, :],
        o.to(out.dtype.element_ty),
        mask=valid[:, None] & (dv < DV)[None, :],
    )
    tl.store(lse + flat, log_sum(top, total), mask=valid)


@triton.jit(do_not_specialize=["first_row", "num_rows", "all_rows"])
def turn_rows(
    query, cos, sin, turned, q_head, q_row, first_row, num_rows, all_rows,
    D: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Query rows from `first_row` on as each segment sees them, [S, H, num_rows, D].

    Grid: (blocks of rows, heads, segments).
    """
    head, segment = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid, at = t < num_rows, (first_row + t).to(tl.int64)
    angle_rows = (segment * all_rows + at) * PAIRS
    x = turned_rows(
        query, cos, sin, head * q_head + at * q_row, angle_rows, valid, D, DP, PAIRS, START, INTERLEAVED
    )  # fmt: skip
    d = tl.arange(0, DP)
    row = (segment * tl.num_programs(1) + head) * num_rows + t
    tl.store(turned + row[:, None] * D + d[None, :], x, mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def add_rows(
    acc, k, q, bias, begin, end, num_rows, first_row, c, is_causal, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,

):  # fmt: skip
    """Query rows begin..end of one head, added to the sums of columns [c]."""
    d = tl.arange(0, DP)
    for start in range(begin, end, ROWS):
        t = start + tl.arange(0, ROWS)
        q_at, b_at = q + t[None, :] * D + d[:, None], bias + first_row + t
        if MASKED:
            x = tl.load(q_at, mask=(t < num_rows)[None, :] & (d < D)[:, None], other=0.0)
            b = tl.load(b_at, mask=t < num_rows, other=float("-inf"))
        elif D < DP:
            x, b = tl.load(q_at, mask=(d < D)[:, None], other=0.0), tl.load(b_at)
        else:
            x, b = tl.load(q_at), tl.load(b_at)
        scores = capped(tl.dot(k, x, input_precision="ieee"), scale, cap, CAPPED) + b[None, :]
        if MASKED:
            seen = (c[:, None] <= (first_row + t)[None, :]) | (is_causal == 0)
            scores = tl.where(seen, scores, float("-inf"))
        acc += tl.sum(tl.exp2(scores), 1)
    return acc


@triton.jit(do_not_specialize=["first_row", "num_rows", "all_rows", "num_columns"])
def sum_columns(
    queries, bias, keys, table, blocks, sums,
    q_segment, first_row, num_rows, all_rows, num_columns, scale, cap,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds some query rows' weighted probabilities to the sums of one block of columns, head by head.

    A program owns its columns: the order of the additions is fixed, and there is nothing to race with.
    `blocks` holds segment, first column, column after the last, and place in `sums` of each block.
    Grid: (blocks of columns, key heads).
    """
    SIZE: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    kv_head = tl.program_id(1).to(tl.int64)
    block = blocks + tl.program_id(0) * 4
    segment, first, last, into = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    row = table + segment * FIELDS
    is_causal = tl.load(row + CAUSAL).to(tl.int32)
    key_row = tl.multiple_of(tl.load(row + KEY_ROW), ALIGN)
    rows = tl.multiple_of(keys + tl.load(row + KEY) + kv_head * tl.load(row + KEY_HEAD), ALIGN * SIZE)
    c, d = first + tl.arange(0, COLUMNS), tl.arange(0, DP)
    exists = (c < last)[:, None] & (d < D)[None, :]
    k = tl.load(rows + c[:, None] * key_row + d[None, :], mask=exists, other=0.0)
    # A causal segment's columns are seen by rows from their own on, and all of them by rows behind the last.
    begin = tl.where(is_causal != 0, tl.maximum(first - first_row, 0) // ROWS * ROWS, 0)
    open_from = tl.where(is_causal != 0, (tl.maximum(last - first_row, 0) + ROWS - 1) // ROWS * ROWS, 0)
    whole = num_rows // ROWS * ROWS
    for g in range(GROUPS):
        head = kv_head * GROUPS + g
        q = queries + segment.to(tl.int64) * q_segment + head * num_rows * D
        b = bias + head * all_rows
        acc = tl.zeros((COLUMNS,), tl.float32)
        acc = add_rows(
            acc, k, q, b, begin, tl.minimum(open_from, num_rows), num_rows, first_row, c, is_causal,
            scale, cap, D, DP, ROWS, CAPPED, True,
        )  # fmt: skip
        acc = add_rows(
            acc, k, q, b, open_from, whole, num_rows, first_row, c, is_causal,
            scale, cap, D, DP, ROWS, CAPPED, False,
        )  # fmt: skip
        acc = add_rows(
            acc, k, q, b, tl.maximum(open_from, whole), num_rows, num_rows, first_row, c, is_causal,
            scale, cap, D, DP, ROWS, CAPPED, True,
        )  # fmt: skip
        at = sums + head * num_columns + into + c - first
        tl.store(at, tl.load(at, mask=c < last, other=0.0) + acc, mask=c < last)
