"""Segment attention on CPU: PyTorch's flash attention per segment, merged by log-sum-exp.

Nothing is copied or expanded: the query heads that share a key head are packed as extra rows, and each
segment's rows are read where they lie (a mapped file, for example).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from kvrag_kernels.segment_attention.reference import acting, group_shift, turn_query
from kvrag_kernels.segment_attention.types import Attended, Group, Rows, Turn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOTHING = float("-inf")

# Elements of all turned queries together that stay in the processor's own memory.
_AT_ONCE = 1 << 18


def is_supported(query: torch.Tensor, segments: Sequence[Rows], softcap: float | None) -> bool:
    """Whether the flash operator can do it: no soft cap, one head size, channels side by side.

    Of channels that lie apart it reads the neighbours instead, without a word.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and softcap is None
        and all(rows.keys.shape[-1] == rows.values.shape[-1] for rows in segments)
        and all(x.stride(-1) == 1 for rows in segments for x in (rows.keys, rows.values) if x.numel())
    )


@cache
def _lse_is_transposed() -> bool:
    """Some releases return the log-sum-exp as [B, T, H]; ask this one once."""
    q = torch.zeros(1, 2, 3, 8)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    return tuple(lse.shape) == (1, 3, 2)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention on CPU with its log-sum-exp [B, H, T], float32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=mask, scale=scale
    )
    return out, lse.transpose(1, 2) if _lse_is_transposed() else lse


def _attend_causally(query: torch.Tensor, rows: Rows, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, D] to itself; the operator's own causal mask needs real heads instead of packed ones."""
    groups = query.shape[1] // rows.keys.shape[1]
    keys, values = rows.keys.repeat_interleave(groups, dim=1), rows.values.repeat_interleave(groups, dim=1)
    return flash(query, keys, values, None, True, scale)


def _attend_late(late: torch.Tensor, rows: Rows, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The query rows from `first_row` on, [B, H, t, D]; the earlier ones see nothing and are not there."""
    batch, heads, num_rows, dim = late.shape
    kv_heads = rows.keys.shape[1]
    mask = rows.mask.additive(heads // kv_heads, late.dtype) if rows.mask is not None else None
    packed = late.reshape(batch, kv_heads, -1, dim)
    out, lse = flash(packed, *_expanded(rows, batch), mask, False, scale)
    if rows.mask is not None and rows.mask.blind is not None:
        # the operator reports 0 for rows that see nothing
        lse = lse.reshape(batch, heads, num_rows).masked_fill(rows.mask.blind, _NOTHING)
    return out, lse


def _expanded(rows: Rows, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.keys.shape[0] == batch:
        return rows.keys, rows.values
    return rows.keys.expand(batch, -1, -1, -1), rows.values.expand(batch, -1, -1, -1)


def segment_attention_cpu(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
    with_lse: bool = False,
) -> Attended:
    """Attend segment by segment and merge; see `segment_attention` for the arguments."""
    batch, heads, num_rows, dim = query.shape
    kv_heads = segments[0].keys.shape[1]
    group = acting(group, segments)
    turned = _Turned(query, turn, len(segments))
    parted = (batch, kv_heads, heads // kv_heads, num_rows)
    lse = query.new_empty((len(segments), *parted), dtype=torch.float32)
    outs: list[tuple[int, torch.Tensor]] = []
    for i, rows in enumerate(segments):
        first = rows.first_row
        if rows.keys.shape[2] == 0 or first >= num_rows:
            lse[i] = _NOTHING
            continue
        factor = scale / group.temperature if group is not None and rows.in_group else scale
        begin = 0
        if rows.causal:
            out, part = _attend_causally(turned.of(i), rows, factor)
        elif rows.mask is not None or 4 * first > num_rows:
            begin = first
            out, part = _attend_late(turned.of(i, first), rows, factor)
        else:  # a few rows too many cost less than a copy of the others
            packed = turned.of(i).reshape(batch, kv_heads, -1, dim)
            out, part = flash(packed, *_expanded(rows, batch), None, False, factor)
        outs.append((i, out.reshape(*parted[:3], num_rows - begin, dim)))
        if first:
            lse[i, ..., begin:] = part.reshape(*parted[:3], -1)
            lse[i, ..., :first] = _NOTHING
        else:
            lse[i] = part.reshape(parted)
    if group is not None:
        inside = [i for i, rows in enumerate(segments) if rows.in_group]
        lse[inside] += group_shift(lse[inside], group, 0)
    mass = _shares(lse.view(len(segments), batch, kv_heads, -1), sinks, num_rows).view(lse.shape)
    return Attended(
        _merge(outs, mass).to(query.dtype).view(query.shape),
        mass.view(-1, batch, heads, num_rows),
        _whole(lse.view(-1, batch, heads, num_rows), sinks) if with_lse else None,
    )


class _Turned:
    """The query as each segment sees it: turned for all at once, or, where that is much, one by one."""

    def __init__(self, query: torch.Tensor, turn: Turn | None, num_segments: int) -> None:
        self._query, self._turn = query, turn
        at_once = num_segments * query.numel() <= _AT_ONCE
        self._whole = turn_query(query, turn, num_segments) if at_once or turn is None else None

    def of(self, i: int, first: int = 0) -> torch.Tensor:
        """[B, H, t, D]: the rows from `first` on."""
        if self._whole is not None:
            return self._whole[i, :, :, first:] if first else self._whole[i]
        assert self._turn is not None
        cos, sin = self._turn.cos[i : i + 1, first:], self._turn.sin[i : i + 1, first:]
        return turn_query(self._query[:, :, first:], replace(self._turn, cos=cos, sin=sin), 1)[0]


def _shares(lse: torch.Tensor, sinks: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """[S, B, K, G * T]: each segment's share of the whole, the attention sinks' share left out."""
    if sinks is None:
        return torch.ones_like(lse) if len(lse) == 1 else lse.softmax(dim=0)
    sink = sinks.float().view(1, 1, lse.shape[2], -1, 1).expand(1, lse.shape[1], -1, -1, num_rows)
    return torch.cat((lse, sink.reshape(1, *lse.shape[1:]))).softmax(dim=0)[:-1]


def _whole(lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """[B, H, T]: of all segments [S, B, H, T] and the attention sinks."""
    total = lse.logsumexp(0)
    return total if sinks is None else torch.logaddexp(total, sinks.float()[:, None])


def _merge(outs: Sequence[tuple[int, torch.Tensor]], mass: torch.Tensor) -> torch.Tensor:
    """[B, K, G, T, Dv], float32: partial outputs by their shares.

    Args:
        outs: numbers of segments, and what they gave the last rows, [B, K, G, t, Dv].
        mass: [S, B, K, G, T].
    """
    if not outs:
        raise ValueError("no segment has rows that the query sees")
    num_rows = mass.shape[-1]
    merged: torch.Tensor | None = None
    for i, out in outs:
        begin = num_rows - out.shape[3]
        if merged is None:
            merged = out.new_zeros((*mass.shape[1:], out.shape[-1]), dtype=torch.float32)
        if begin:
            merged[..., begin:, :].addcmul_(out.float(), mass[i, ..., begin:, None])
        else:
            merged.addcmul_(out.float(), mass[i, ..., None])
    assert merged is not None
    return merged
