"""A stride on CPU: PyTorch's flash attention per segment, merged by log-sum-exp; then the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.segment_attention.cpu import flash
from kvrag_kernels.segment_attention.reference import turn_query
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.columns import summed_columns
from kvrag_kernels.strided_prefill.types import Scoring, Strided


def is_supported(query: torch.Tensor, segments: Sequence[Rows], softcap: float | None) -> bool:
    """Whether the flash operator can do it, and is the fastest way.

    In 16 bits a block's softmax in float32 is as fast, and gives the scores at once. Of channels that lie
    apart the operator would read the neighbours.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and softcap is None
        and all(rows.is_open or rows.causal for rows in segments)
        and all(rows.keys.shape[-1] == rows.values.shape[-1] for rows in segments)
        and all(x.stride(-1) == 1 for rows in segments for x in (rows.keys, rows.values) if x.numel())
    )


def strided_prefill_cpu(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attend segment by segment; see `strided_prefill` for the arguments."""
    turned = turn_query(query, turn, len(segments))
    lse = query.new_full((len(segments), *query.shape[:3]), float("-inf"), dtype=torch.float32)
    outs = []
    for i, rows in enumerate(segments):
        if rows.keys.shape[2]:
            out, lse[i] = _attend(turned[i], rows, scale)
            outs.append((i, out))
    total = lse.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float()[None, :, None])
    mass = (lse - total).exp_()
    merged = torch.zeros_like(query)
    for i, out in outs:
        merged.addcmul_(out, mass[i, ..., None])
    scores = None
    if scoring is not None:
        scores = summed_columns(turned[:, 0], segments, total[0], scoring, scale=scale)
    return Strided(merged, total, mass, scores)


def _attend(query: torch.Tensor, rows: Rows, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, T, D] and log-sum-exp [B, H, T] of one segment."""
    batch, heads, num_rows, dim = query.shape
    kv_heads = rows.keys.shape[1]
    keys, values = rows.keys.expand(batch, -1, -1, -1), rows.values.expand(batch, -1, -1, -1)
    if rows.causal:  # the operator's own causal mask needs real heads
        groups = heads // kv_heads
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        return flash(query, keys, values, None, True, scale)
    out, lse = flash(query.reshape(batch, kv_heads, -1, dim), keys, values, None, False, scale)
    return out.reshape(query.shape), lse.reshape(batch, heads, num_rows)
