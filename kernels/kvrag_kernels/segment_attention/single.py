"""Segment attention when there is one segment only: PyTorch's own attention, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kvrag_kernels.segment_attention.forms import AnyRows
from kvrag_kernels.segment_attention.reference import acting, turn_query
from kvrag_kernels.segment_attention.types import Attended, Group, Rows, Turn


def is_single(segments: Sequence[AnyRows], softcap: float | None, sinks: torch.Tensor | None) -> bool:
    """Whether there is nothing to merge and nothing that PyTorch's operator cannot do."""
    return len(segments) == 1 and softcap is None and sinks is None and segments[0].first_row == 0


def segment_attention_single(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    group: Group | None = None,
) -> Attended:
    """Attend to the only segment; see `segment_attention` for the arguments."""
    (rows,) = segments
    group = acting(group, segments)
    if group is not None:  # its weight against everything else has no meaning where nothing else is
        scale = scale / group.temperature
    batch, heads, num_rows, _ = query.shape
    out = F.scaled_dot_product_attention(
        turn_query(query, turn, 1)[0],
        rows.keys.expand(batch, -1, -1, -1),
        rows.values.expand(batch, -1, -1, -1),
        attn_mask=rows.mask.allowed if rows.mask is not None else None,
        is_causal=rows.causal,
        scale=scale,
        enable_gqa=heads != rows.keys.shape[1],
    )
    return Attended(out, query.new_ones((1, batch, heads, num_rows), dtype=torch.float32))
