"""Attention of a stride as one softmax over everything: the definition, without any care for memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.types import Scoring, Strided


def segment_scores(
    query: torch.Tensor, rows: Rows, *, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """Scores of query rows to one segment.

    Args:
        query: [B, H, T, D], turned for this segment.
        rows: the segment.
        scale: factor on the scores.
        softcap: soft cap of the scores.

    Returns:
        [B, H, T, n], float32; minus infinity where nothing is seen.
    """
    keys = rows.keys.repeat_interleave(query.shape[1] // rows.keys.shape[1], dim=1).float()
    scores = torch.matmul(query.float(), keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible(rows, query.shape[2]), float("-inf"))


def strided_prefill_reference(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attend to all segments as to one sequence; see `strided_prefill` for the arguments."""
    batch, heads, num_rows, _ = query.shape
    turned = turn_query(query, turn, len(segments))
    parts = [segment_scores(turned[i], rows, scale=scale, softcap=softcap) for i, rows in enumerate(segments)]
    everything = torch.cat(parts, dim=-1)
    if sinks is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(batch, heads, num_rows, 1)
        everything = torch.cat((everything, extra), dim=-1)
    lse = everything.logsumexp(-1)
    # A row that sees nothing has probabilities of 0, not of 0 / 0.
    level = lse.masked_fill(lse == float("-inf"), 0)[..., None]
    probs = [(part - level).exp() for part in parts]
    out = query.new_zeros((batch, heads, num_rows, segments[0].values.shape[-1]), dtype=torch.float32)
    for p, rows in zip(probs, segments, strict=True):
        out += torch.matmul(p, rows.values.repeat_interleave(heads // rows.values.shape[1], dim=1).float())
    mass = torch.stack([p.sum(-1) for p in probs])
    scores = None if scoring is None else _scores(probs, scoring)
    return Strided(out.to(query.dtype), lse, mass, scores)


def column_scores_reference(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    lse: torch.Tensor,
    scoring: Scoring,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Score the columns; see `column_scores` for the arguments."""
    turned = turn_query(query, turn, len(segments))
    level = lse.masked_fill(lse == float("-inf"), 0)[..., None]
    probs = [
        (segment_scores(turned[i], rows, scale=scale, softcap=softcap) - level).exp()
        for i, rows in enumerate(segments)
    ]
    return _scores(probs, scoring)


def _scores(probs: Sequence[torch.Tensor], scoring: Scoring) -> torch.Tensor:
    """[H, N]: weighted sums over query rows."""
    return scoring.keep(torch.einsum("t,htn->hn", scoring.weights, torch.cat(list(probs), dim=-1)[0]))
