"""Segment attention on a GPU: flash-decoding whose splits know the segments' borders. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from kvrag_kernels.quantise.blocks import packed_values, turned_keys
from kvrag_kernels.segment_attention.blocks import attend_block, log_sum, turned_query
from kvrag_kernels.segment_attention.table import COLUMN, COLUMNS

# Columns of the table, see `kvrag_kernels.segment_attention.table`.
WIDTH = tl.constexpr(len(COLUMNS))
KEYS = tl.constexpr(COLUMN["keys"])
VALUES = tl.constexpr(COLUMN["values"])
KEY_HEAD = tl.constexpr(COLUMN["key_head"])
KEY_ROW = tl.constexpr(COLUMN["key_row"])
VALUE_HEAD = tl.constexpr(COLUMN["value_head"])
VALUE_ROW = tl.constexpr(COLUMN["value_row"])
FIRST_ROW = tl.constexpr(COLUMN["first_row"])
DIAGONAL = tl.constexpr(COLUMN["diagonal"])
MASK = tl.constexpr(COLUMN["mask"])
MASK_ROW = tl.constexpr(COLUMN["mask_row"])
SLOT = tl.constexpr(COLUMN["slot"])
PAGES = tl.constexpr(COLUMN["pages"])
KEY_PAGE = tl.constexpr(COLUMN["key_page"])
VALUE_PAGE = tl.constexpr(COLUMN["value_page"])
QUANTISED = tl.constexpr(COLUMN["quantised"])
FULL = tl.constexpr(COLUMN["full"])
KEY_SCALE = tl.constexpr(COLUMN["key_scale"])
KEY_ZERO = tl.constexpr(COLUMN["key_zero"])
KEY_REST = tl.constexpr(COLUMN["key_rest"])
VALUE_SCALE = tl.constexpr(COLUMN["value_scale"])
VALUE_ZERO = tl.constexpr(COLUMN["value_zero"])
KEY_SCALE_HEAD = tl.constexpr(COLUMN["key_scale_head"])
REST_HEAD = tl.constexpr(COLUMN["rest_head"])
VALUE_SCALE_HEAD = tl.constexpr(COLUMN["value_scale_head"])

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def blocks_per_split(total, splits, GROUPED: tl.constexpr):
    """Blocks that one split reads; with a group, its last split and that of the others may be short."""
    if GROUPED:
        share = tl.cdiv(total, splits - 1)
    else:
        share = tl.cdiv(total, splits)
    return tl.maximum(share, 1)


@triton.jit
def first_block(split, share, grouped, total, GROUPED: tl.constexpr):
    """The block with which a split begins; no split reads of the group and of others."""
    if GROUPED:
        inside = tl.cdiv(grouped, share)
        block = tl.where(split < inside, split * share, grouped + (split - inside) * share)
    else:
        block = split * share
    return tl.minimum(block, total)


@triton.jit
def split_of(block, share, grouped, GROUPED: tl.constexpr):
    """The split that reads a block."""
    if GROUPED:
        split = tl.where(
            block < grouped, block // share, tl.cdiv(grouped, share) + (block - grouped) // share
        )
    else:
        split = block // share
    return split


@triton.jit
def attend_kernel(
    Q, COS, SIN, LOCAL_COS, LOCAL_SIN, TABLE, LENGTHS, OUT, SPLIT, PIECES,
    query_batch, query_head, query_row, turn_batch,
    num_segments, num_grouped, num_queries, kv_heads, page, num_local,
    factor, group_factor, softcap,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr,
    SOFTCAP: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
    FORM: tl.constexpr, VALUE_WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    SP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention of BM packed query rows of one key head to one split of all rows.

    Writes the split's output [B, K, P, G * T, Dv] and base-two log-sum-exp [B, K, P, G * T], and the
    latter of every segment's part of the split: [B, K, S + P, G * T], that of segment s in split p at
    s + p. Both never fall along the rows, so every place belongs to one pair, and every program fills
    those between its own first and the next one's.
    """
    split, splits = tl.program_id(2), tl.num_programs(2)
    bk = tl.program_id(1)
    b, k = bk // kv_heads, bk % kv_heads
    ids = tl.arange(0, SP)
    lengths = tl.load(LENGTHS + b * num_segments + ids, mask=ids < num_segments, other=0)
    blocks = tl.cdiv(lengths, BN)
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    grouped = tl.sum(tl.where(ids < num_grouped, blocks, 0), 0)
    share = blocks_per_split(total, splits, GROUPED)
    first = first_block(split, share, grouped, total, GROUPED)
    last = first_block(split + 1, share, grouped, total, GROUPED)
    real = ids < num_segments
    segment = tl.sum(tl.where(real & (ends <= first), 1, 0), 0)
    segment = tl.where(split == 0, 0, segment)
    final = tl.sum(tl.where(real & (ends <= last), 1, 0), 0)

    row = tl.program_id(0) * BM + tl.arange(0, BM)
    num_rows = G * num_queries
    there = row < num_rows
    t = row % num_queries
    offsets = b * query_batch + (k * G + row // num_queries) * query_head + t * query_row
    n, d, dv = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    top = tl.full((BM,), float("-inf"), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, DVP), tl.float32)

    for s in range(segment, final + 1):
        begin = tl.sum(tl.where(ids == s, ends - blocks, 0), 0)
        end = tl.sum(tl.where(ids == s, ends, 0), 0)
        length = tl.sum(tl.where(ids == s, lengths, 0), 0)
        line = TABLE + (b * num_segments + tl.minimum(s, num_segments - 1)) * WIDTH
        turn_rows = tl.maximum(tl.load(line + SLOT).to(tl.int32), 0) * num_queries + t
        query = turned_query(
            Q, offsets, there, COS + b * turn_batch, SIN + b * turn_batch, turn_rows,
            D, DP, R, START, INTERLEAVED, ROTATED,
        )  # fmt: skip
        scale = factor
        if GROUPED:
            scale = tl.where(s < num_grouped, group_factor, factor)
        first_row = tl.load(line + FIRST_ROW).to(tl.int32)
        furthest = t + tl.load(line + DIAGONAL).to(tl.int32)
        sees = there & (t >= first_row)
        mask_row = tl.load(line + MASK_ROW).to(tl.int32)
        mask = tl.load(line + MASK).to(tl.pointer_type(tl.int8))
        # A comparison of numbers alone is no boolean tensor to the interpreter.
        masked = tl.zeros((BM,), tl.int64) + tl.load(line + MASK) != 0
        part = tl.zeros((BM,), tl.float32)
        quantised = tl.load(line + QUANTISED) != 0
        key_row, value_row = tl.load(line + KEY_ROW), tl.load(line + VALUE_ROW)
        low, high = tl.maximum(first, begin) - begin, tl.minimum(last, end) - begin
        if FORM != 0:
            packed_low, packed_high = low, tl.where(quantised, high, low)
            low = tl.where(quantised, high, low)
            packed = tl.load(line + KEYS).to(tl.pointer_type(tl.uint8))
            values_at = tl.load(line + VALUES).to(tl.pointer_type(tl.uint8))
            head, value_head = tl.load(line + KEY_HEAD), tl.load(line + VALUE_HEAD)
            if ALIGNED:
                packed, values_at = tl.multiple_of(packed, 16), tl.multiple_of(values_at, 16)
                head, value_head = tl.multiple_of(head, 16), tl.multiple_of(value_head, 16)
            packed, values_at = packed + k * head, values_at + k * value_head
            scale_head, value_scale_head = (
                k * tl.load(line + KEY_SCALE_HEAD),
                k * tl.load(line + VALUE_SCALE_HEAD),
            )
            if FORM == 1:
                key_scale = tl.load(line + KEY_SCALE).to(tl.pointer_type(tl.float32)) + scale_head
                value_scale = tl.load(line + VALUE_SCALE).to(tl.pointer_type(tl.float32)) + value_scale_head
                key_zero, value_zero = key_scale, value_scale
            else:
                key_scale = tl.load(line + KEY_SCALE).to(tl.pointer_type(tl.float16)) + scale_head
                value_scale = tl.load(line + VALUE_SCALE).to(tl.pointer_type(tl.float16)) + value_scale_head
                key_zero = tl.load(line + KEY_ZERO).to(tl.pointer_type(tl.float16)) + scale_head
                value_zero = tl.load(line + VALUE_ZERO).to(tl.pointer_type(tl.float16)) + value_scale_head
            rest = tl.load(line + KEY_REST).to(Q.dtype) + k * tl.load(line + REST_HEAD)
            full = tl.load(line + FULL).to(tl.int32)
            for block in range(packed_low, packed_high):
                j = block * BN + n
                inside = j < length
                keys = turned_keys(
                    packed, D if FORM != 3 else D // 2, key_scale, key_zero, rest, full, block, inside,
                    LOCAL_COS, LOCAL_SIN, num_local, D, DP, R, START, INTERLEAVED, ROTATED, FORM, BN,
                ).to(query.dtype)  # fmt: skip
                values = packed_values(
                    values_at, DV if FORM != 3 else DV // 2, value_scale, value_zero, j, inside,
                    DV, DVP, FORM, VALUE_WIDTH,
                ).to(query.dtype)  # fmt: skip
                seen = sees[:, None] & inside[None, :] & (j[None, :] <= furthest[:, None])
                if MASKED:
                    at = (t - first_row)[:, None] * mask_row + j[None, :]
                    seen = seen & (tl.load(mask + at, mask=seen & masked[:, None], other=1) != 0)
                top, sums, part, out = attend_block(
                    query, keys, values, seen, top, sums, part, out, scale, softcap, SOFTCAP
                )
        keys_at, rows_at = tl.load(line + KEYS).to(Q.dtype), tl.load(line + VALUES).to(Q.dtype)
        head, value_head = tl.load(line + KEY_HEAD), tl.load(line + VALUE_HEAD)
        if ALIGNED:  # otherwise every element would be read on its own
            keys_at, rows_at = tl.multiple_of(keys_at, 16), tl.multiple_of(rows_at, 16)
            head, value_head = tl.multiple_of(head, ALIGNED), tl.multiple_of(value_head, ALIGNED)
            key_row, value_row = tl.multiple_of(key_row, ALIGNED), tl.multiple_of(value_row, ALIGNED)
        if PAGED:
            pages = tl.load(line + PAGES).to(tl.pointer_type(tl.int32))
            is_paged = tl.zeros((BN,), tl.int64) + tl.load(line + PAGES) != 0
            key_page, value_page = tl.load(line + KEY_PAGE), tl.load(line + VALUE_PAGE)
            if ALIGNED:
                key_page, value_page = tl.multiple_of(key_page, ALIGNED), tl.multiple_of(value_page, ALIGNED)
        keys_at, rows_at = keys_at + k * head, rows_at + k * value_head
        for block in range(low, high):
            j = block * BN + n
            inside = j < length
            if PAGED:
                number = tl.load(pages + j // page, mask=inside & is_paged, other=0).to(tl.int64)
                within = tl.where(is_paged, j % page, j).to(tl.int64)
                key_offsets = number * key_page + within * key_row
                value_offsets = number * value_page + within * value_row
            else:
                key_offsets = j.to(tl.int64) * key_row
                value_offsets = j.to(tl.int64) * value_row
            keys = tl.load(
                keys_at + key_offsets[:, None] + d[None, :],
                mask=inside[:, None] & (d < D)[None, :],
                other=0.0,
            )
            values = tl.load(
                rows_at + value_offsets[:, None] + dv[None, :],
                mask=inside[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
            seen = sees[:, None] & inside[None, :] & (j[None, :] <= furthest[:, None])
            if MASKED:
                at = (t - first_row)[:, None] * mask_row + j[None, :]
                seen = seen & (tl.load(mask + at, mask=seen & masked[:, None], other=1) != 0)
            top, sums, part, out = attend_block(
                query, keys, values, seen, top, sums, part, out, scale, softcap, SOFTCAP
            )
        piece = (bk * (num_segments + splits) + s + split).to(tl.int64) * num_rows
        tl.store(PIECES + piece + row, log_sum(top, part), mask=there)
    at = (bk * splits + split).to(tl.int64) * num_rows + row
    tl.store(SPLIT + at, log_sum(top, sums), mask=there)
    out = out / tl.where(sums > 0, sums, 1.0)[:, None]
    worked = there & (tl.zeros((BM,), tl.int32) + first < last)
    tl.store(OUT + at[:, None] * DV + dv[None, :], out, mask=worked[:, None] & (dv < DV)[None, :])


@triton.jit
def merge_kernel(
    OUT, SPLIT, PIECES, TABLE, LENGTHS, SINKS, MERGED, MASS, LSE,
    num_segments, num_grouped, num_rows, kv_heads, splits, num_queries, group_power,
    G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, HAS_SINKS: tl.constexpr, GROUPED: tl.constexpr,
    SP: tl.constexpr, PP: tl.constexpr, PB: tl.constexpr, JB: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """RB packed query rows: the splits' outputs by their weights, every segment's mass, and the whole sum."""
    bk = tl.program_id(1)
    b, k = bk // kv_heads, bk % kv_heads
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    known = row < num_rows
    ids = tl.arange(0, SP)
    real = ids < num_segments
    lengths = tl.load(LENGTHS + b * num_segments + ids, mask=real, other=0)
    blocks = tl.cdiv(lengths, BN)
    ends = tl.cumsum(blocks, 0)
    grouped = tl.sum(tl.where(ids < num_grouped, blocks, 0), 0)
    share = blocks_per_split(tl.sum(blocks, 0), splits, GROUPED)
    inside = tl.cdiv(grouped, share)  # splits that read of the group
    first = (bk * splits).to(tl.int64) * num_rows
    p = tl.arange(0, PP)
    seen = (p < splits)[:, None] & known[None, :]
    scores = tl.load(SPLIT + first + p[:, None] * num_rows + row[None, :], mask=seen, other=float("-inf"))
    shift = tl.zeros((RB,), tl.float32)
    if GROUPED:
        of_group = tl.where((p < inside)[:, None], scores, float("-inf"))
        highest = tl.max(of_group, 0)
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        within = log_sum(safe, tl.sum(tl.exp2(of_group - safe[None, :]), 0))
        shift = tl.where(highest == float("-inf"), 0.0, group_power * within)
        scores = tl.where((p < inside)[:, None], scores + shift[None, :], scores)
    highest = tl.max(scores, 0)
    if HAS_SINKS:
        sink = tl.load(SINKS + k * G + row // num_queries, mask=known, other=0.0).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(scores - safe[None, :]), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - safe)
    place = (bk * num_rows).to(tl.int64) + row
    tl.store(LSE + place, log_sum(safe, total) / LOG2_E, mask=known)
    total = tl.where(total > 0, total, 1.0)

    dv = tl.arange(0, DVP)
    merged = tl.zeros((RB, DVP), tl.float32)
    for start in range(0, splits, PB):
        q = start + tl.arange(0, PB)
        at = first + q[:, None] * num_rows + row[None, :]
        score = tl.load(SPLIT + at, mask=(q < splits)[:, None] & known[None, :], other=float("-inf"))
        if GROUPED:
            score = tl.where((q < inside)[:, None], score + shift[None, :], score)
        weight = tl.exp2(score - safe[None, :]) / total[None, :]
        # A split that saw nothing has written nothing.
        written = (weight > 0)[:, :, None] & (dv < DV)[None, None, :]
        part = tl.load(OUT + at[:, :, None] * DV + dv[None, None, :], mask=written, other=0.0)
        merged += tl.sum(part * weight[:, :, None], 0)
    tl.store(
        MERGED + place[:, None] * DV + dv[None, :],
        merged.to(MERGED.dtype.element_ty),
        mask=known[:, None] & (dv < DV)[None, :],
    )

    filled = real & (blocks > 0)
    lowest = split_of(ends - blocks, share, grouped, GROUPED)
    uppermost = split_of(ends - 1, share, grouped, GROUPED)
    most = tl.max(tl.where(filled, uppermost - lowest + 1, 0), 0)
    mass = tl.zeros((SP, RB), tl.float32)
    start = (bk * (num_segments + splits)).to(tl.int64) * num_rows
    for j0 in range(0, most, JB):
        at = lowest[:, None] + j0 + tl.arange(0, JB)[None, :]
        read = (filled[:, None] & (at <= uppermost[:, None]))[:, :, None] & known[None, None, :]
        places = (ids[:, None] + at)[:, :, None] * num_rows + row[None, None, :]
        score = tl.load(PIECES + start + places, mask=read, other=float("-inf"))
        if GROUPED:
            score = tl.where((ids < num_grouped)[:, None, None], score + shift[None, None, :], score)
        mass += tl.sum(tl.exp2(score - safe[None, None, :]), 1)
    slots = tl.load(TABLE + (b * num_segments + ids) * WIDTH + SLOT, mask=real, other=-1)
    tl.store(
        MASS + slots[:, None] * tl.num_programs(1) * num_rows + place[None, :],
        mass / total[None, :],
        mask=(slots >= 0)[:, None] & known[None, :],
    )
