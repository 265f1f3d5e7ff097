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
    cos, sin = turn.cos[:, None, None], turn.sin[:, None, None]  # [S, 1, 1, T, R]
    out = torch.empty((num_segments, *query.shape), dtype=torch.float32, device=query.device)
    turn_into(out, query.float(), cos, sin, turn)
    return out.to(query.dtype)


def turn_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, like: Turn) -> None:
    """Write rotated rows to where they are wanted.

    Args:
        out: [..., D], float32.
        x: [..., D], float32; spreads over `out`.
        cos: [..., R], spreads over `out`.
        sin: [..., R].
        like: which dimensions are pairs; its own angles do not count.
    """
    pairs, start = cos.shape[-1], like.start
    end = start + 2 * pairs
    first, second = (
        (slice(start, end, 2), slice(start + 1, end, 2))
        if like.interleaved
        else (slice(start, start + pairs), slice(start + pairs, end))
    )
    a, b = x[..., first], x[..., second]
    torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
    if start:
        out[..., :start] = x[..., :start]
    if end < x.shape[-1]:
        out[..., end:] = x[..., end:]
