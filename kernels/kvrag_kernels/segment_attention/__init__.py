"""Attention over segments that lie anywhere and appear anywhere.

Scores under rotary embeddings depend on position differences only, so a segment appears at another
place when the query is turned by the difference; its keys are neither moved nor copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.segment_attention import cpu
from kvrag_kernels.segment_attention.columns import column_mass, column_scores, part_mass
from kvrag_kernels.segment_attention.cpu import segment_attention_cpu
from kvrag_kernels.segment_attention.parted import parted_attention
from kvrag_kernels.segment_attention.reference import column_scores_reference, segment_attention_reference
from kvrag_kernels.segment_attention.single import is_single, segment_attention_single
from kvrag_kernels.segment_attention.types import Attended, Group, RowMask, Rows, Turn

__all__ = [
    "Attended",
    "Group",
    "RowMask",
    "Rows",
    "Turn",
    "column_mass",
    "column_scores",
    "column_scores_reference",
    "part_mass",
    "parted_attention",
    "segment_attention",
    "segment_attention_cpu",
    "segment_attention_reference",
    "segment_attention_single",
]


def segment_attention(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
) -> Attended:
    """Attention of fresh rows to segments, as if all segments were one sequence at their places.

    Args:
        query: [B, H, T, D], not rotated.
        segments: at least one; keys [B or 1, K, n, D] with H a multiple of K, n may be 0.
        turn: the rotation of each query row for each segment; None in layers without positions.
        scale: factor on the scores.
        softcap: scores are squeezed to softcap * tanh(score / softcap) before the mask.
        sinks: [H], extra scores that take attention and give nothing (gpt-oss).
        group: how the segments with `in_group` are read, after the soft cap; None: like all others.

    Returns:
        Output [B, H, T, Dv] and each segment's attention mass [S, B, H, T] in float32.

    Raises:
        ValueError: no segments, or head counts that do not divide.

    Source: partial results are merged as in flash-decoding (Dao et al. 2023); the rotation of the query
    instead of the keys follows from RoPE's relative form (Su et al. 2021, arXiv:2104.09864, sec. 3.2).
    """
    if not segments:
        raise ValueError("segment_attention needs at least one segment")
    if query.shape[1] % segments[0].keys.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {segments[0].keys.shape[1]} key heads")
    if cpu.is_supported(query, segments, softcap):
        return segment_attention_cpu(query, segments, turn, scale=scale, sinks=sinks, group=group)
    if is_single(segments, softcap, sinks):
        return segment_attention_single(query, segments, turn, scale=scale, group=group)
    return segment_attention_reference(
        query, segments, turn, scale=scale, softcap=softcap, sinks=sinks, group=group
    )
