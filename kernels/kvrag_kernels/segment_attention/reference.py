"""The definition of segment attention: explicit scores, one softmax in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.segment_attention.forms import AnyRows
from kvrag_kernels.segment_attention.types import Attended, Group, Rows, Turn
from kvrag_kernels.turning import turn_query

__all__ = ["acting", "group_shift", "segment_attention_reference", "turn_query", "visible"]


def visible(rows: Rows, num_rows: int) -> torch.Tensor:
    """[T, n], bool: what each of all T query rows sees of a segment."""
    n, device = rows.keys.shape[-2], rows.keys.device
    seen = torch.ones(num_rows, n, dtype=torch.bool, device=device)
    if rows.mask is not None:
        seen[rows.first_row :] = rows.mask.allowed
    if rows.causal:
        seen = seen.tril()
    seen[: rows.first_row] = False
    return seen


def acting(group: Group | None, segments: Sequence[AnyRows]) -> Group | None:
    """The group where it changes anything, else None: then attention without groups runs, bit for bit."""
    if group is None or (group.temperature == 1 and group.scale == 1):
        return None
    return group if any(rows.in_group for rows in segments) else None


def group_shift(scores: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """What is added to the scores of a group before they meet everything else.

    Args:
        scores: the group's visible scores, divided by the temperature, or log-sum-exps of parts of them;
            minus infinity where nothing is seen.
        group: temperature T and scale S.
        dim: along which the group lies.

    Returns:
        (S * T - 1) * G with size 1 along `dim`; 0 for query rows that see nothing of the group.
    """
    blind = (scores == float("-inf")).all(dim, keepdim=True)
    # Blind rows are filled first: the gradient of a log-sum-exp of nothing is NaN.
    total = scores.masked_fill(blind, 0).logsumexp(dim, keepdim=True)
    return ((group.scale * group.temperature - 1) * total).masked_fill(blind, 0)


def _shifted(scores: Sequence[torch.Tensor], segments: Sequence[Rows], group: Group) -> list[torch.Tensor]:
    inside = [s for s, rows in zip(scores, segments, strict=True) if rows.in_group]
    shift = group_shift(torch.cat(inside, dim=-1), group, -1)
    return [s + shift if rows.in_group else s for s, rows in zip(scores, segments, strict=True)]


def segment_attention_reference(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
) -> Attended:
    """Attend to all segments as to one sequence; see `segment_attention` for the arguments."""
    parts, lse = _shares(query, segments, turn, scale=scale, softcap=softcap, sinks=sinks, group=group)
    groups = query.shape[1] // segments[0].keys.shape[1]
    values = [
        rows.values.repeat_interleave(groups, dim=1).expand(query.shape[0], -1, -1, -1) for rows in segments
    ]
    mass = torch.stack([part.sum(-1) for part in parts])
    probs = torch.cat(parts, dim=-1).to(query.dtype)
    return Attended(torch.matmul(probs, torch.cat(values, dim=-2)), mass, lse)


def _shares(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """[B, H, T, n] for each segment, float32: one softmax over everything; and its log-sum-exp [B, H, T]."""
    num_rows, groups = query.shape[2], query.shape[1] // segments[0].keys.shape[1]
    group = acting(group, segments)
    turned = turn_query(query, turn, len(segments))
    scores = []
    for i, rows in enumerate(segments):
        keys = rows.keys.repeat_interleave(groups, dim=1)
        s = torch.matmul(turned[i], keys.transpose(-1, -2)).float() * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if group is not None and rows.in_group:
            s = s / group.temperature
        scores.append(s.masked_fill(~visible(rows, num_rows), float("-inf")))
    if group is not None:
        scores = _shifted(scores, segments, group)
    if sinks is not None:
        scores.append(sinks.float().reshape(1, -1, 1, 1).expand(*query.shape[:3], 1))
    everything = torch.cat(scores, dim=-1)
    weights = everything.softmax(dim=-1)
    parts: tuple[torch.Tensor, ...] = weights.split([s.shape[-1] for s in scores], dim=-1)
    return parts[: len(segments)], everything.logsumexp(-1)
