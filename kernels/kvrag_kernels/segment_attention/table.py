"""Where the kernel finds the rows: one line of integers per segment, made once and read by every program.

Knows nothing of Triton. What the kernel can read is decided here, in `is_supported`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from kvrag_kernels.quantise import Form, Quantised
from kvrag_kernels.segment_attention.forms import AnyRows, PagedRows, QuantisedRows
from kvrag_kernels.segment_attention.reference import acting
from kvrag_kernels.segment_attention.types import Group
from kvrag_kernels.turning import Turn

COLUMNS = (
    "keys",  # addresses
    "values",
    "key_head",  # elements from one head to the next
    "key_row",  # elements from one row to the next
    "value_head",
    "value_row",
    "first_row",
    "diagonal",  # query row t sees columns up to t + diagonal
    "mask",  # address, 0 for none
    "mask_row",
    "slot",  # number of the segment as the caller counts, -1 for padding
    "pages",  # address of page numbers, 0 for rows in one run
    "key_page",  # elements from one page to the next
    "value_page",
    "quantised",  # 1 for rows in fewer bits
    "full",  # rows of keys in groups; the others are kept as they are
    "key_scale",  # addresses
    "key_zero",
    "key_rest",
    "value_scale",
    "value_zero",
    "key_scale_head",
    "rest_head",
    "value_scale_head",
)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}

EVERYTHING = 1 << 30  # a diagonal that hides nothing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_MOST_SEGMENTS = 1024
_ALIGNED = 16  # bytes that one thread reads at once

_PADDING = [-1 if name == "slot" else 0 for name in COLUMNS]
_NO_PAGES = (0, 0, 0)
_PLAIN = (0,) * 10  # no columns of rows in fewer bits


@dataclass(frozen=True, slots=True)
class Table:
    """The segments of a batch of requests as the kernel reads them.

    Attributes:
        lines: [B, S, columns], int64: see `COLUMNS`; the group's segments first, padded with empty ones where
            requests have fewer.
        lengths: [B, S], int32: rows of each segment; may be changed between two runs, up to what is there.
        order: for each request, the number of the segment in every place, None for padding.
        num_grouped: places of the context group, 0 if there is none that acts.
        page: rows of a page, 0 without pages.
        form: of the rows in fewer bits, None without such.
        local: rotation of the longest such segment.
        has_masks: some segment has a mask.
        is_aligned: all rows begin where one thread may read 16 bytes at once.
        num_slots: segments of the longest request.
        longest: rows of the request with the most.
        kept: what the addresses point to, so that it stays.
    """

    lines: torch.Tensor
    lengths: torch.Tensor
    order: tuple[tuple[int | None, ...], ...]
    num_grouped: int
    page: int
    form: Form | None
    local: Turn | None
    has_masks: bool
    is_aligned: bool
    num_slots: int
    longest: int
    kept: tuple[torch.Tensor, ...]


def is_supported(query: torch.Tensor, tables: Sequence[Sequence[AnyRows]], turn: Turn | None) -> bool:
    """Whether the kernel can read these segments; what it cannot read goes the plain way.

    Not supported are gradients, heads larger than 256, rows of another type or device than the query's,
    channels that do not lie side by side, tables in which pages differ in size, or forms or rotations of
    rows in fewer bits differ, and four bits where an odd number of pairs is rotated.

    Args:
        query: [B, H, T, D].
        tables: segments of each request, or of all requests alike.
        turn: the query's rotation.
    """
    every = list(chain.from_iterable(tables))
    return (
        query.dtype in _DTYPES
        and query.stride(-1) == 1
        and query.shape[-1] <= _LARGEST_HEAD
        and all(len(segments) <= _MOST_SEGMENTS for segments in tables)
        and all(_is_readable(rows, query, turn) for rows in every)
        and len({rows.keys.shape[2] for rows in every if isinstance(rows, PagedRows)}) <= 1
        and len({rows.packed.form for rows in every if isinstance(rows, QuantisedRows)}) <= 1
        and len({size for rows in every for size in _value_sizes(rows)}) == 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, *_tensors(every))))
    )


def _is_readable(rows: AnyRows, query: torch.Tensor, turn: Turn | None) -> bool:
    if isinstance(rows, QuantisedRows):
        packed, local = rows.packed, rows.local
        return (
            packed.keys.device == query.device
            and all(part[0].is_contiguous() for part in packed.tensors)
            and (packed.key_rest is None or packed.key_rest.dtype == query.dtype)
            and packed.key_size == query.shape[-1]
            and _rotates_alike(local, turn)
            and not (packed.form == "int4" and _parts_pairs(local))
        )
    return (
        rows.keys.dtype == rows.values.dtype == query.dtype
        and rows.keys.device == query.device
        and rows.keys.shape[-1] == query.shape[-1]
        and rows.values.shape[-1] <= _LARGEST_HEAD
        and (rows.keys.numel() == 0 or rows.keys.stride(-1) == rows.values.stride(-1) == 1)
    )


def _rotates_alike(local: Turn | None, turn: Turn | None) -> bool:
    """Whether the same pairs are rotated in keys and query."""
    if local is None or turn is None:
        return local is turn
    return (
        local.cos.is_contiguous()
        and local.sin.is_contiguous()
        and (local.start, local.interleaved, local.cos.shape[-1])
        == (turn.start, turn.interleaved, turn.cos.shape[-1])
    )


def _parts_pairs(local: Turn | None) -> bool:
    """Whether a channel and the one it is rotated with lie in different halves of their bytes."""
    return local is not None and (
        local.start % 2 == 1 or (not local.interleaved and local.cos.shape[-1] % 2 == 1)
    )


def _value_sizes(rows: AnyRows) -> tuple[int, ...]:
    return (rows.packed.value_size,) if isinstance(rows, QuantisedRows) else (rows.values.shape[-1],)


def value_size(rows: AnyRows) -> int:
    """Dv."""
    return _value_sizes(rows)[0]


def _tensors(every: Sequence[AnyRows]) -> Iterator[torch.Tensor]:
    for rows in every:
        if isinstance(rows, QuantisedRows):
            yield from rows.packed.tensors
        else:
            yield rows.keys
            yield rows.values
        if isinstance(rows, PagedRows):
            yield rows.pages
        if rows.mask is not None:
            yield rows.mask.allowed


def num_rows(rows: AnyRows) -> int:
    """Columns of one segment."""
    if isinstance(rows, QuantisedRows):
        return rows.packed.num_rows
    return rows.num_rows if isinstance(rows, PagedRows) else rows.keys.shape[2]


def table_of(tables: Sequence[Sequence[AnyRows]], batch: int, group: Group | None) -> Table:
    """Write down where the rows of a batch lie.

    Made for every call, and so written for speed: a fifth of a millisecond for 32 segments.

    Args:
        tables: segments of each of B requests; or one list that all of them share, whose keys may have a
            batch of their own.
        batch: B.
        group: how grouped segments are read; None: like all others.
    """
    every = list(chain.from_iterable(tables))
    order, num_grouped = _order(tables, acting(group, every) is not None)
    lines, lengths = [], []
    for b in range(batch):
        segments, places = tables[b % len(tables)], order[b % len(tables)]
        item = b if len(tables) == 1 else 0
        lines.append([_PADDING if i is None else _line(segments[i], i, item) for i in places])
        lengths.append([0 if i is None else num_rows(segments[i]) for i in places])
    device = _device(every)
    quantised = [rows for rows in every if isinstance(rows, QuantisedRows)]
    longest = max(quantised, key=num_rows, default=None)
    return Table(
        torch.tensor(lines, dtype=torch.int64, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        tuple(order[b % len(tables)] for b in range(batch)),
        num_grouped,
        next((rows.keys.shape[2] for rows in every if isinstance(rows, PagedRows)), 0),
        quantised[0].packed.form if quantised else None,
        longest.local if longest is not None else None,
        any(rows.mask is not None for rows in every),
        all(_is_aligned(rows) for rows in every),
        max(len(segments) for segments in tables),
        max(sum(request) for request in lengths),
        tuple(_tensors(every)),
    )


def _order(tables: Sequence[Sequence[AnyRows]], acts: bool) -> tuple[list[tuple[int | None, ...]], int]:
    """Places of the segments, those of an acting group first; all requests as many of both kinds."""
    inside = [[i for i, rows in enumerate(segments) if acts and rows.in_group] for segments in tables]
    outside = [[i for i, rows in enumerate(segments) if not (acts and rows.in_group)] for segments in tables]
    most, others = max(map(len, inside)), max(map(len, outside))
    return [
        (*a, *[None] * (most - len(a)), *b, *[None] * (others - len(b)))
        for a, b in zip(inside, outside, strict=True)
    ], most


def _line(rows: AnyRows, slot: int, item: int) -> list[int]:
    """One segment's integers, for sequence `item` of its batch, in the order of `COLUMNS`."""
    mask = rows.mask
    seen = (0, 0) if mask is None else (mask.allowed.data_ptr(), mask.allowed.stride(0))
    if isinstance(rows, QuantisedRows):
        return [
            *_packed(rows.packed),
            rows.first_row,
            EVERYTHING,
            *seen,
            slot,
            *_NO_PAGES,
            *_scales(rows.packed),
        ]
    keys, values = rows.keys, rows.values
    batch, head, row, _ = keys.stride()
    value_batch, value_head, value_row, _ = values.stride()
    pages = _NO_PAGES
    if isinstance(rows, PagedRows):
        pages, item = (rows.pages.data_ptr(), batch, value_batch), 0
    size = keys.element_size()
    return [
        keys.data_ptr() + (item * batch * size if keys.shape[0] > 1 else 0),
        values.data_ptr() + (item * value_batch * size if values.shape[0] > 1 else 0),
        head,
        row,
        value_head,
        value_row,
        rows.first_row,
        0 if rows.causal else EVERYTHING,
        *seen,
        slot,
        *pages,
        *_PLAIN,
    ]


def _packed(packed: Quantised) -> tuple[int, ...]:
    """Addresses and strides of rows in fewer bits."""
    return (
        packed.keys.data_ptr(),
        packed.values.data_ptr(),
        packed.keys.stride(0),
        packed.keys.shape[2],
        packed.values.stride(0),
        packed.values.shape[2],
    )


def _scales(packed: Quantised) -> tuple[int, ...]:
    """Everything from "quantised" on."""
    zero, value_zero, rest = packed.key_zero, packed.value_zero, packed.key_rest
    return (
        1,
        packed.keys.shape[1],
        packed.key_scale.data_ptr(),
        zero.data_ptr() if zero is not None else 0,
        rest.data_ptr() if rest is not None else 0,
        packed.value_scale.data_ptr(),
        value_zero.data_ptr() if value_zero is not None else 0,
        packed.key_scale.stride(0),
        rest.stride(0) if rest is not None else 0,
        packed.value_scale.stride(0),
    )


def _is_aligned(rows: AnyRows) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    stored = rows.packed if isinstance(rows, QuantisedRows) else rows
    bits = 0
    for x in (stored.keys, stored.values):
        strides = x.stride()
        bits |= x.data_ptr() | x.element_size() * (strides[0] | strides[1] | strides[-2])
    return bits % _ALIGNED == 0


def _device(every: Sequence[AnyRows]) -> torch.device:
    first = every[0]
    return first.packed.keys.device if isinstance(first, QuantisedRows) else first.keys.device
