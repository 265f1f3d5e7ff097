"""Rotations of rows by tables of angles: what rotary embeddings do, for any difference of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Turn:
    """How far each segment turns each query row: a rotation by a position difference.

    Attributes:
        cos: [S, T, R], float32, for R rotated pairs; made from float64 angles.
        sin: [S, T, R], float32.
        start: first rotated dimension of the head.
        interleaved: pairs are neighbours (2i, 2i + 1); otherwise (i, i + R).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    start: int = 0
    interleaved: bool = False


def turn_query(query: torch.Tensor, turn: Turn | None, num_segments: int) -> torch.Tensor:
    """Rotate the query once per segment, in float32, with one rounding at the end.

    Args:
        query: [B, H, T, D], any float dtype.
        turn: angles per segment and row; None leaves the query as it is.
        num_segments: S.

    Returns:
        [S, B, H, T, D], dtype of `query`.
    """
    if turn is None:
        return query.expand(num_segments, *query.shape)
    pairs, start, end = turn.cos.shape[-1], turn.start, turn.start + 2 * turn.cos.shape[-1]
    cos, sin = turn.cos[:, None, None], turn.sin[:, None, None]  # [S, 1, 1, T, R]
    exact = query.float()
    out = torch.empty((num_segments, *query.shape), dtype=torch.float32, device=query.device)
    first, second = (
        (slice(start, end, 2), slice(start + 1, end, 2))
        if turn.interleaved
        else (slice(start, start + pairs), slice(start + pairs, end))
    )
    a, b = exact[..., first], exact[..., second]
    torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
    if start:
        out[..., :start] = exact[..., :start]
    if end < query.shape[-1]:
        out[..., end:] = exact[..., end:]
    return out.to(query.dtype)
