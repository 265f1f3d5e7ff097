"""Segments that do not lie as plain rows: in pages of a pool, or in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvrag_kernels.quantise import Quantised, dequantise
from kvrag_kernels.segment_attention.types import RowMask, Rows
from kvrag_kernels.turning import Turn


@dataclass(frozen=True, slots=True)
class PagedRows:
    """One segment in pages of a pool that many segments share.

    Attributes:
        keys: [P, K, page, D], rotated as those of `Rows`.
        values: [P, K, page, Dv].
        pages: [m], int32: numbers of the segment's pages, in order; negative ones are not allowed.
        num_rows: rows that are there, at most m * page.
        first_row: see `Rows`.
        mask: see `Rows`.
        causal: see `Rows`.
        in_group: see `Rows`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    num_rows: int
    first_row: int = 0
    mask: RowMask | None = None
    causal: bool = False
    in_group: bool = False

    def __post_init__(self) -> None:
        room = self.pages.shape[0] * self.keys.shape[2]
        if not 0 <= self.num_rows <= room:
            raise ValueError(f"{self.pages.shape[0]} pages hold {room} rows, not {self.num_rows}")

    def rows(self, dtype: torch.dtype) -> Rows:
        """The rows in one run, copied."""
        keys, values = (_gathered(pool, self.pages, self.num_rows) for pool in (self.keys, self.values))
        return Rows(keys, values, self.first_row, self.mask, self.causal, self.in_group)


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """One segment in fewer bits; its keys are rotated at their local positions as they are read.

    Attributes:
        packed: keys, not rotated, and values.
        local: [1, n, R]: the rotation of positions 0..n-1, of the same pairs as the query's `Turn`; None in
            layers without positions.
        first_row: see `Rows`.
        mask: see `Rows`.
        in_group: see `Rows`.
    """

    packed: Quantised
    local: Turn | None
    first_row: int = 0
    mask: RowMask | None = None
    in_group: bool = False

    def rows(self, dtype: torch.dtype) -> Rows:
        """The rows as they are read: unpacked, rotated and rounded to `dtype` once."""
        keys, values = dequantise(self.packed, dtype, self.local)
        return Rows(keys[None], values[None], self.first_row, self.mask, in_group=self.in_group)


AnyRows = Rows | PagedRows | QuantisedRows


def plain(rows: AnyRows, dtype: torch.dtype) -> Rows:
    """Any segment as plain rows; those that are in another form are copied."""
    return rows if isinstance(rows, Rows) else rows.rows(dtype)


def num_kv_heads(rows: AnyRows) -> int:
    """K."""
    return rows.packed.keys.shape[0] if isinstance(rows, QuantisedRows) else rows.keys.shape[1]


def _gathered(pool: torch.Tensor, pages: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[1, K, n, D] of [P, K, page, D]."""
    rows = pool.index_select(0, pages.long()).transpose(0, 1).flatten(1, 2)
    return rows[None, :, :num_rows]
