"""What the kernel does with one block of rows: turn the query for it, and attend to it."""

from __future__ import annotations

import triton
import triton.language as tl

from kvrag_kernels.quantise.blocks import pairs_of


@triton.jit
def turned_query(
    Q, offsets, ok, COS, SIN, turn_rows,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """Query rows at `offsets` [M], rotated in float32 by rows `turn_rows` [M] of the tables, rounded once."""
    d = tl.arange(0, DP)
    seen = ok[:, None] & (d < D)[None, :]
    query = tl.load(Q + offsets[:, None] + d[None, :], mask=seen, other=0.0)
    if ROTATED:
        rotated, pair, partner, sign = pairs_of(d, R, START, INTERLEAVED)
        other = tl.load(Q + offsets[:, None] + partner[None, :], mask=seen, other=0.0).to(tl.float32)
        at = turn_rows[:, None] * R + pair[None, :]
        turned = ok[:, None] & rotated[None, :]
        cos = tl.load(COS + at, mask=turned, other=1.0)
        sin = tl.load(SIN + at, mask=turned, other=0.0)
        query = (query.to(tl.float32) * cos + other * (sign[None, :] * sin)).to(query.dtype)
    return query


@triton.jit
def log_sum(top, sums):
    """Base-two log-sum-exp of scores whose exponentials, relative to `top`, sum to `sums`."""
    return tl.where(sums > 0, top + tl.log2(tl.where(sums > 0, sums, 1.0)), float("-inf"))


@triton.jit
def attend_block(query, keys, values, seen, top, total, part, out, factor, softcap, SOFTCAP: tl.constexpr):
    """One step of the running softmax over base-two scores.

    `part` sums up what the segment at hand gets, relative to the same largest score as `total`.
    """
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP:
        # softcap holds the scale over the cap, factor the cap and what follows it
        scores = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * scores * softcap, 80.0)) + 1.0)
    scores = tl.where(seen, scores * factor, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(
        highest == float("-inf"), 0.0, highest
    )  # nothing seen so far: no difference of infinities
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    gained = tl.sum(weights, 1)
    out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return highest, total * shrink + gained, part * shrink + gained, out
