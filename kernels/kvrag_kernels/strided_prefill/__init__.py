"""A stride of query rows over everything a memory holds and over itself, with exact scores of the columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels._backend import backend
from kvrag_kernels.segment_attention import gathered
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill import cpu
from kvrag_kernels.strided_prefill.columns import column_scores_blockwise
from kvrag_kernels.strided_prefill.cpu import strided_prefill_cpu
from kvrag_kernels.strided_prefill.reference import column_scores_reference, strided_prefill_reference
from kvrag_kernels.strided_prefill.rowwise import strided_prefill_rowwise
from kvrag_kernels.strided_prefill.scored import strided_prefill_gathered
from kvrag_kernels.strided_prefill.types import Reduction, Scoring, Strided, ema_weights, reduce_heads

__all__ = [
    "Reduction",
    "Scoring",
    "Strided",
    "column_scores",
    "column_scores_blockwise",
    "column_scores_reference",
    "ema_weights",
    "reduce_heads",
    "strided_prefill",
    "strided_prefill_cpu",
    "strided_prefill_gathered",
    "strided_prefill_reference",
    "strided_prefill_rowwise",
]


def strided_prefill(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attention of a stride to segments and itself, as if all segments were one sequence at their places.

    What `segment_attention` computes, made for hundreds of query rows and more, with the log-sum-exp of each
    row and, if asked for, the exact score of each column. Any number, length and place of segments is data:
    nothing is compiled for it.

    Args:
        query: [B, H, T, D], not rotated.
        segments: keys [B or 1, K, n, D] with H a multiple of K; the stride's own rows are one with `causal`.
            Masks, and segments that only some rows see, are computed on a slower path.
        turn: the rotation of each query row for each segment; None in layers without positions.
        scale: factor on the scores.
        softcap: scores are squeezed to softcap * tanh(score / softcap).
        sinks: [H], extra scores that take attention and give nothing (gpt-oss).
        scoring: weights of the query rows, and which columns are scored; needs B = 1.

    Raises:
        ValueError: no columns, head counts that do not divide, a batch to be scored, or weights and columns
            that do not fit.

    Source: strided prefill of Cascading KV Cache (Willette et al. 2024, arXiv:2406.17808), with exact scores.
    """
    _check(query, segments, scoring)
    chosen = backend(query.device)
    if chosen == "reference":
        return strided_prefill_reference(
            query, segments, turn, scale=scale, softcap=softcap, sinks=sinks, scoring=scoring
        )
    if chosen == "triton":
        from kvrag_kernels.strided_prefill import launch  # noqa: PLC0415 - needs triton

        if launch.is_supported(query, segments):
            return launch.strided_prefill_triton(
                query, segments, turn, scale=scale, softcap=softcap, sinks=sinks, scoring=scoring
            )
    elif softcap is None and gathered.is_supported(query, segments, turn):
        return strided_prefill_gathered(query, segments, turn, scale=scale, sinks=sinks, scoring=scoring)
    elif cpu.is_supported(query, segments, softcap):
        return strided_prefill_cpu(query, segments, turn, scale=scale, sinks=sinks, scoring=scoring)
    return strided_prefill_rowwise(
        query, segments, turn, scale=scale, softcap=softcap, sinks=sinks, scoring=scoring
    )


def column_scores(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    lse: torch.Tensor,
    scoring: Scoring,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Exact weighted sums of the attention probabilities of each column, from log-sum-exps that are known.

    Deterministic: every sum has a fixed order.

    Args:
        query: [1, H, T, D], not rotated.
        segments: as they were attended to.
        turn: the same.
        lse: [1, H, T], float32: of the whole attention, see `Strided.lse`.
        scoring: weights and columns.
        scale: factor on the scores.
        softcap: soft cap of the scores.

    Returns:
        [H, N], float32, for all N columns of all segments; zero where nothing was asked for.

    Raises:
        ValueError: as `strided_prefill`.
    """
    _check(query, segments, scoring)
    chosen = backend(query.device)
    if chosen == "reference":
        return column_scores_reference(query, segments, turn, lse, scoring, scale=scale, softcap=softcap)
    if chosen == "triton":
        from kvrag_kernels.strided_prefill import launch  # noqa: PLC0415 - needs triton

        if launch.is_supported(query, segments):
            return launch.column_scores_triton(
                query, segments, turn, lse, scoring, scale=scale, softcap=softcap
            )
    return column_scores_blockwise(query, segments, turn, lse, scoring, scale=scale, softcap=softcap)


def _check(query: torch.Tensor, segments: Sequence[Rows], scoring: Scoring | None) -> None:
    num_columns = sum(rows.keys.shape[2] for rows in segments)
    if not num_columns:
        raise ValueError("a stride needs at least one column to attend to: its own rows are a segment, too")
    if query.shape[1] % segments[0].keys.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {segments[0].keys.shape[1]} key heads")
    if scoring is not None:
        if query.shape[0] != 1:
            raise ValueError(f"columns of one sequence are scored, not of a batch of {query.shape[0]}")
        scoring.check(query.shape[2], num_columns)
