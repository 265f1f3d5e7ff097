"""Attention over segments that lie anywhere and appear anywhere.

Scores under rotary embeddings depend on position differences only, so a segment appears at another
place when the query is turned by the difference; its keys are neither moved nor copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels._backend import backend
from kvrag_kernels.segment_attention import cpu, gathered
from kvrag_kernels.segment_attention.columns import column_mass, part_mass
from kvrag_kernels.segment_attention.cpu import segment_attention_cpu
from kvrag_kernels.segment_attention.forms import AnyRows, PagedRows, QuantisedRows, num_kv_heads, plain
from kvrag_kernels.segment_attention.gathered import segment_attention_gathered
from kvrag_kernels.segment_attention.parted import Parts, parted_attention
from kvrag_kernels.segment_attention.reference import segment_attention_reference
from kvrag_kernels.segment_attention.single import is_single, segment_attention_single
from kvrag_kernels.segment_attention.table import is_supported
from kvrag_kernels.segment_attention.types import Attended, Group, RowMask, Rows, Turn

__all__ = [
    "AnyRows",
    "Attended",
    "Group",
    "PagedRows",
    "Parts",
    "QuantisedRows",
    "RowMask",
    "Rows",
    "Turn",
    "column_mass",
    "is_supported",
    "part_mass",
    "parted_attention",
    "segment_attention",
    "segment_attention_cpu",
    "segment_attention_gathered",
    "segment_attention_many",
    "segment_attention_reference",
    "segment_attention_single",
]

_SHORT = 256  # query rows up to which one segment alone is left to our kernel


def segment_attention(
    query: torch.Tensor,
    segments: Sequence[AnyRows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
    with_lse: bool = False,
) -> Attended:
    """Attention of fresh rows to segments, as if all segments were one sequence at their places.

    Args:
        query: [B, H, T, D], not rotated.
        segments: at least one; keys [B or 1, K, n, D] with H a multiple of K, n may be 0. Those in pages
            or in fewer bits are read as they lie where the Triton kernel runs, and copied elsewhere.
        turn: the rotation of each query row for each segment; None in layers without positions.
        scale: factor on the scores.
        softcap: scores are squeezed to softcap * tanh(score / softcap) before the mask.
        sinks: [H], extra scores that take attention and give nothing (gpt-oss).
        group: how the segments with `in_group` are read, after the soft cap; None: like all others.
        with_lse: the log-sum-exp of each row is wanted, too.

    Returns:
        Output [B, H, T, Dv] and each segment's attention mass [S, B, H, T] in float32; where it is wanted,
        the log-sum-exp [B, H, T].

    Raises:
        ValueError: no segments, or head counts that do not divide.

    Source: partial results are merged as in flash-decoding (Dao et al. 2023); the rotation of the query
    instead of the keys follows from RoPE's relative form (Su et al. 2021, arXiv:2104.09864, sec. 3.2).
    """
    _check(query, segments)
    chosen = backend(query.device)
    if chosen == "triton" and _is_for_triton(query, segments, turn, softcap, sinks, with_lse):
        from kvrag_kernels.segment_attention.launch import StaticAttention  # noqa: PLC0415 - triton is an extra

        run = StaticAttention(
            query, [segments], [turn], scale=scale, softcap=softcap, sinks=sinks, group=group
        )
        return run(query)
    rows = [plain(segment, query.dtype) for segment in segments]
    if chosen != "reference" and softcap is None and gathered.is_faster(query, rows, turn, group):
        return segment_attention_gathered(query, rows, turn, scale=scale, sinks=sinks)
    if chosen != "reference" and cpu.is_supported(query, rows, softcap):
        return segment_attention_cpu(
            query, rows, turn, scale=scale, sinks=sinks, group=group, with_lse=with_lse
        )
    if chosen != "reference" and not with_lse and is_single(rows, softcap, sinks):
        return segment_attention_single(query, rows, turn, scale=scale, group=group)
    return segment_attention_reference(
        query, rows, turn, scale=scale, softcap=softcap, sinks=sinks, group=group
    )


def segment_attention_many(
    query: torch.Tensor,
    tables: Sequence[Sequence[AnyRows]],
    turns: Sequence[Turn | None],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group: Group | None = None,
    with_lse: bool = False,
) -> list[Attended]:
    """Attention of several requests, each to segments of its own: with Triton in one launch.

    Args:
        query: [B, H, T, D], not rotated; one request each.
        tables: segments of each request, whose keys are [1, K, n, D].
        turns: of each request.
        scale: see `segment_attention`.
        softcap: see `segment_attention`.
        sinks: see `segment_attention`.
        group: see `segment_attention`.
        with_lse: see `segment_attention`.

    Returns:
        For each request what `segment_attention` returns for it alone, with B = 1.

    Raises:
        ValueError: as `segment_attention`, or not as many tables and turns as requests.
    """
    if not query.shape[0] == len(tables) == len(turns):
        raise ValueError(
            f"{query.shape[0]} queries need as many tables and turns, not {len(tables)}, {len(turns)}"
        )
    for segments in tables:
        _check(query, segments)
    if (
        backend(query.device) == "triton"
        and all(is_supported(query, [segments], turn) for segments, turn in zip(tables, turns, strict=True))
        and is_supported(query, tables, turns[0])
    ):
        from kvrag_kernels.segment_attention.launch import attend_many  # noqa: PLC0415 - triton is an extra

        return attend_many(query, tables, turns, scale=scale, softcap=softcap, sinks=sinks, group=group)
    return [
        segment_attention(
            query[i : i + 1],
            segments,
            turn,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            group=group,
            with_lse=with_lse,
        )
        for i, (segments, turn) in enumerate(zip(tables, turns, strict=True))
    ]


def _check(query: torch.Tensor, segments: Sequence[AnyRows]) -> None:
    if not segments:
        raise ValueError("segment_attention needs at least one segment")
    heads = num_kv_heads(segments[0])
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads cannot share {heads} key heads")


def _is_for_triton(
    query: torch.Tensor,
    segments: Sequence[AnyRows],
    turn: Turn | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    with_lse: bool,
) -> bool:
    """Whether our kernel does it; many rows over one plain run are PyTorch's own operator's strength."""
    is_long = query.shape[2] > _SHORT and not with_lse
    if is_long and isinstance(segments[0], Rows) and is_single(segments, softcap, sinks):
        return False
    return is_supported(query, [segments], turn)
