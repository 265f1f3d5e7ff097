"""How a segment's share of the attention falls on its columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Rows, Turn

_CELLS = 1 << 24  # scores in memory at once, 64 MiB of float32


def column_mass(
    query: torch.Tensor,
    rows: Rows,
    turn: Turn | None,
    mass: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    temperature: float = 1.0,
    from_row: int = 0,
) -> torch.Tensor:
    """Attention mass of each column of one segment, from explicit scores of this segment alone.

    A column's probability in the whole attention is its probability within the segment times the
    segment's share, so no other segment, sink or group has to be read again.

    Args:
        query: [1, H, T, D], not rotated.
        rows: the segment; query heads that share a key head are packed, so nothing is expanded.
        turn: of this segment, with S = 1, or None.
        mass: [1, H, T], float32: the segment's share as `Attended.mass` has it.
        scale: factor on the scores.
        softcap: soft cap of the scores.
        temperature: of the group if the segment was read in one, else 1.
        from_row: query rows before this one do not count.

    Returns:
        [n], float32: mean over heads and over the query rows from `from_row` on, where rows that do not
        see the segment count as zero; sums to `mass[..., from_row:].mean()`.

    Raises:
        ValueError: a batch, or no query row to take the mean of.
    """
    total = torch.zeros(rows.keys.shape[2], dtype=torch.float32, device=query.device)
    for _, probs in _probabilities(query, rows, turn, mass, scale, softcap, temperature, from_row):
        total += probs.sum(dim=(0, 1))
    return total.div_(query.shape[1] * (query.shape[2] - from_row))


def part_mass(
    query: torch.Tensor,
    rows: Rows,
    turn: Turn | None,
    mass: torch.Tensor,
    parts: Sequence[tuple[int, int]],
    *,
    scale: float,
    softcap: float | None = None,
    from_row: int = 0,
) -> torch.Tensor:
    """Attention mass of some runs of columns of one segment; see `column_mass` for what is not said here.

    Args:
        query: [1, H, T, D], not rotated.
        rows: the segment.
        turn: of this segment, or None.
        mass: [1, H, T], float32.
        parts: first column, and column after the last, of each run.
        scale: factor on the scores.
        softcap: soft cap of the scores.
        from_row: query rows before this one are not looked at and get zeros.

    Returns:
        [P, 1, H, T], float32.
    """
    found = torch.zeros((len(parts), *query.shape[:3]), dtype=torch.float32, device=query.device)
    for start, probs in _probabilities(query, rows, turn, mass, scale, softcap, 1.0, from_row):
        for i, (first, end) in enumerate(parts):
            found[i, 0, :, start : start + probs.shape[1]] = probs[..., first:end].sum(-1)
    return found


def _probabilities(
    query: torch.Tensor,
    rows: Rows,
    turn: Turn | None,
    mass: torch.Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    from_row: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """First query row and probabilities [H, t, n] in the whole attention, as many rows as fit into memory."""
    batch, heads, num_rows, dim = query.shape
    if batch != 1:
        raise ValueError(f"column_mass takes one sequence, not a batch of {batch}")
    if not 0 <= from_row < num_rows:
        raise ValueError(f"from_row must lie in 0..{num_rows - 1}, not at {from_row}")
    kv_heads, columns = rows.keys.shape[1], rows.keys.shape[2]
    first = max(from_row, rows.first_row)
    if columns == 0 or first >= num_rows:
        return
    late = replace(turn, cos=turn.cos[:, first:], sin=turn.sin[:, first:]) if turn is not None else None
    turned = turn_query(query[:, :, first:], late, 1).view(kv_heads, -1, num_rows - first, dim)
    seen = visible(rows, num_rows)[first:] if rows.mask is not None or rows.causal else None
    step = max(1, _CELLS // (heads * columns))
    for start in range(0, num_rows - first, step):
        part = slice(start, start + step)
        packed = turned[:, :, part].reshape(kv_heads, -1, dim)
        scores = torch.matmul(packed, rows.keys[0].transpose(-1, -2)).float().mul_(scale)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores = scores.div_(temperature).view(heads, -1, columns)
        shares = mass[0, :, first:][:, part]
        yield first + start, _share_out(scores, shares, seen[part] if seen is not None else None)


def _share_out(scores: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """[H, T, n]: the masses [H, T] spread over columns by their scores, which are written to."""
    if seen is not None:
        scores = scores.masked_fill_(~seen, float("-inf"))
    probs = scores.softmax(dim=-1).mul_(mass[..., None])
    if seen is not None:
        probs.masked_fill_(~seen.any(-1, keepdim=True), 0)  # a softmax over nothing is NaN
    return probs
