"""One block of rows in fewer bits, read by whichever kernel needs it."""

from __future__ import annotations

import triton
import triton.language as tl

# What `kvrag_kernels.quantise` calls its forms.
RAW = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
GROUP = tl.constexpr(32)


@triton.jit
def pairs_of(d, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each channel: whether it is rotated, the number of its pair, its partner, and the sine's sign."""
    rel = d - START
    rotated = (rel >= 0) & (rel < 2 * R)
    if INTERLEAVED:
        pair = rel // 2
        partner = START + (rel ^ 1)
        sign = tl.where((rel & 1) == 0, -1.0, 1.0)
    else:
        pair = rel % R
        partner = START + (rel + R) % (
            2 * R
        )  # not a select: the compiler sees that neighbours stay neighbours
        sign = tl.where(rel < R, -1.0, 1.0)
    return rotated, tl.where(rotated, pair, 0), tl.where(rotated, partner, d), sign


@triton.jit
def from_e4m3(bits):
    """Eight-bit floats of any device: the bits of a half with a smaller bias, so that a factor is missing."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def steps_of(base, offsets, first, ok, D: tl.constexpr, FORM: tl.constexpr, SWAP: tl.constexpr):
    """Numbers of eight or four bits as float32, [N, DP].

    Rows begin `offsets` [N] bytes behind `base`; `first` says which bytes of a row are read, [DP], or
    [DP // 2] for four bits, which SWAP takes upper half first.
    """
    if FORM == INT4:
        seen = ok[:, None] & (first < D // 2)[None, :]
        both = tl.load(base + offsets[:, None] + first[None, :], mask=seen, other=0)
        low, high = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
        if SWAP:
            steps = tl.interleave(high, low)
        else:
            steps = tl.interleave(low, high)
    else:
        seen = ok[:, None] & (first < D)[None, :]
        bits = tl.load(base + offsets[:, None] + first[None, :], mask=seen, other=0)
        if FORM == FP8:
            steps = from_e4m3(bits)
        else:
            steps = bits.to(tl.float32)
    return steps


@triton.jit
def packed_keys(
    base, row, scale, zero, rest, full, j, ok, channels, first,
    D: tl.constexpr, FORM: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Keys of rows `j` [N] and `channels` [DP], not rotated, float32."""
    if FORM == FP8:
        x = steps_of(base, j * row, first, ok, D, FORM, SWAP)
        keys = x * tl.load(scale + channels, mask=channels < D, other=0.0)[None, :]
    else:
        inside = ok & (j < full)
        x = steps_of(base, j * row, first, inside, D, FORM, SWAP)
        at = (j // GROUP)[:, None] * D + channels[None, :]
        seen = inside[:, None] & (channels < D)[None, :]
        x = x * tl.load(scale + at, mask=seen, other=0.0).to(tl.float32)
        x += tl.load(zero + at, mask=seen, other=0.0).to(tl.float32)
        kept = (ok & (j >= full))[:, None] & (channels < D)[None, :]
        at = (j - full)[:, None] * D + channels[None, :]
        keys = tl.where((j < full)[:, None], x, tl.load(rest + at, mask=kept, other=0.0).to(tl.float32))
    return keys


@triton.jit
def packed_values(
    base, row, scale, zero, j, ok,
    DV: tl.constexpr, DVP: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Values of rows `j`, float32, [N, DVP]."""
    channels = tl.arange(0, DVP)
    if FORM == INT4:
        x = steps_of(base, j * row, tl.arange(0, DVP // 2), ok, DV, FORM, False)
    else:
        x = steps_of(base, j * row, channels, ok, DV, FORM, False)
    if FORM == FP8:
        values = x * tl.load(scale + j, mask=ok, other=0.0)[:, None]
    else:
        at = j[:, None] * (DV // WIDTH) + (channels // WIDTH)[None, :]
        seen = ok[:, None] & (channels < DV)[None, :]
        x = x * tl.load(scale + at, mask=seen, other=0.0).to(tl.float32)
        values = x + tl.load(zero + at, mask=seen, other=0.0).to(tl.float32)
    return values


@triton.jit
def turned_keys(
    base, row, scale, zero, rest, full, block, ok, LOCAL_COS, LOCAL_SIN, num_local,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr, FORM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys of a block, unpacked and rotated at their local positions, float32, [BN, DP].

    The angle of row block * BN + r is that of the block's first row plus that of row r: two small tables
    instead of a large one.
    """
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    j = block * BN + n
    if FORM == INT4:
        first = tl.arange(0, DP // 2)
    else:
        first = d
    keys = packed_keys(base, row, scale, zero, rest, full, j, ok, d, first, D, FORM, False)
    if ROTATED:
        rotated, pair, partner, sign = pairs_of(d, R, START, INTERLEAVED)
        if FORM != INT4:
            other = packed_keys(base, row, scale, zero, rest, full, j, ok, partner, partner, D, FORM, False)
        elif INTERLEAVED:
            other = packed_keys(base, row, scale, zero, rest, full, j, ok, partner, first, D, FORM, True)
        else:  # a pair's channels lie R // 2 bytes apart
            rel = first - START // 2
            across = tl.where((rel >= 0) & (rel < R), START // 2 + (rel + R // 2) % R, first)
            other = packed_keys(base, row, scale, zero, rest, full, j, ok, partner, across, D, FORM, False)
        start_cos = tl.load(LOCAL_COS + block * BN * R + pair, mask=rotated, other=1.0)[None, :]
        start_sin = tl.load(LOCAL_SIN + block * BN * R + pair, mask=rotated, other=0.0)[None, :]
        at = n[:, None] * R + pair[None, :]
        there = (n < num_local)[:, None] & rotated[None, :]
        row_cos = tl.load(LOCAL_COS + at, mask=there, other=1.0)
        row_sin = tl.load(LOCAL_SIN + at, mask=there, other=0.0)
        cos = start_cos * row_cos - start_sin * row_sin
        sin = start_sin * row_cos + start_cos * row_sin
        keys = keys * cos + other * (sign[None, :] * sin)
    return keys
