"""Attention to one run of rows that was copied together from several segments, with a mass for each part."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Attended, Rows, Turn


def parted_attention(
    query: torch.Tensor,
    rows: Rows,
    turn: Turn | None,
    borders: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Attended:
    """Attend to one run by explicit scores; for the few query rows of a decode step.

    Args:
        query: [B, H, T, D], not rotated.
        rows: the run; query heads that share a key head are packed, so nothing is expanded.
        turn: with S = 1, or None.
        borders: [P], int64: column at which each part ends, in order; the last part may end before the
            run does.
        scale: factor on the scores.
        softcap: soft cap of the scores.
        sinks: [H], extra scores.

    Returns:
        Output [B, H, T, Dv] and the mass of each part, [P, B, H, T].
    """
    batch, heads, num_rows, dim = query.shape
    kv_heads, columns = rows.keys.shape[1], rows.keys.shape[2]
    packed = turn_query(query, turn, 1)[0].reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(packed, rows.keys.transpose(-1, -2)).float().mul_(scale)
    scores = scores.view(batch, heads, num_rows, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if rows.mask is not None or rows.causal or rows.first_row:
        scores = scores.masked_fill(~visible(rows, num_rows), float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, num_rows, 1)
        scores = torch.cat((scores, sink), dim=-1)
    probs = scores.softmax(dim=-1)[..., :columns]
    sums = F.pad(probs.cumsum(dim=-1), (1, 0)).index_select(-1, borders).movedim(-1, 0)
    out = torch.matmul(probs.to(rows.values.dtype).reshape(batch, kv_heads, -1, columns), rows.values)
    mass = torch.cat((sums[:1], sums[1:] - sums[:-1]))
    return Attended(out.view(batch, heads, num_rows, -1), mass)
