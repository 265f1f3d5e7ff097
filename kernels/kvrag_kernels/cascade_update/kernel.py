"""One level of the cascade's tournament in Triton: all segments of all layers and heads at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_residents", "num_segments", "num_leaving", "num_kept", "longest"])
def play_level(
    residents, firsts, places, scores, before_sources, before_scores, best_sources, best_scores, kept,
    score_head, before_item, before_head, num_residents, num_segments, num_leaving, num_kept, longest,
    capacity, heads,
    IS_FIRST: tl.constexpr, SEGMENTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The last of the best of every segment; written to what the next level gets, to what stays, or to both.

    What arrives at a level are first `residents` (ring slots), then what the level before pushed out: of the
    first level, the new tokens. Grid: (blocks of segments, blocks of heads); lanes lie along the heads.
    """
    g = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    is_segment, is_head = g < num_segments, h < heads
    first = tl.load(firsts + g, mask=is_segment, other=0)
    end = tl.load(firsts + g + 1, mask=is_segment, other=0)
    source = tl.full((SEGMENTS, HEADS), -1, tl.int64)
    score = tl.full((SEGMENTS, HEADS), float("-inf"), scores.dtype.element_ty)
    for j in range(longest):
        item = first + j
        plays = item < end
        stays = plays & (item < num_residents)
        comes = plays & (item >= num_residents)
        slot = tl.load(residents + item, mask=stays, other=0)
        row = item - num_residents
        old = stays[:, None] & is_head[None, :]
        new = comes[:, None] & is_head[None, :]
        theirs = tl.load(scores + h[None, :] * score_head + slot[:, None], mask=old, other=0.0)
        at = row[:, None] * before_item + h[None, :] * before_head
        their_score = tl.where(old, theirs, tl.load(before_scores + at, mask=new, other=0.0))
        if IS_FIRST:
            their_source = tl.where(old, slot[:, None], capacity + row[:, None])
        else:
            their_source = tl.where(old, slot[:, None], tl.load(before_sources + at, mask=new, other=0))
        wins = plays[:, None] & (their_score >= score)
        source, score = tl.where(wins, their_source, source), tl.where(wins, their_score, score)
    leaves = (g < num_leaving)[:, None] & is_head[None, :]
    at = g.to(tl.int64)[:, None] * heads + h[None, :]
    tl.store(best_sources + at, source, mask=leaves)
    tl.store(best_scores + at, score, mask=leaves)
    place = tl.load(places + g, mask=is_segment, other=-1)
    stays_here = (place >= 0)[:, None] & is_head[None, :]
    tl.store(kept + h[None, :] * num_kept + place[:, None], source, mask=stays_here)
