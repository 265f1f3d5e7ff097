"""Hands tensors of rows to the Triton kernels: many layers at once, as long as their copies stay small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import gcd, tau

import torch

from kvrag_kernels.move_rows import kernel
from kvrag_kernels.move_rows.types import Moving, Places, Spin

_TAKEN_BYTES = 256 << 20  # gathered rows that wait for being written
_ROWS = 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Kind = tuple[torch.dtype, int, int, tuple[int, int, bool] | None]


def is_supported(rows: Sequence[Moving]) -> bool:
    """Whether the kernels can do it: float rows whose dimensions lie side by side."""
    return all(
        x.into.dtype in _DTYPES and all(t.stride(-1) == 1 for t in (x.into, x.held, x.fresh)) for x in rows
    )


def move_rows_triton(rows: Sequence[Moving], places: Places) -> None:
    """Two launches for all tensors of one kind; see `move_rows` for the arguments."""
    slots, sources = places.slots.contiguous(), places.sources.contiguous()
    for batch in _batches(rows, len(slots)):
        taken = [_gather(list(group), slots, sources, places.num_before) for _, group in _kinds(batch)]
        for group, table, align, found in taken:  # everything is read before anything is written
            kernel.scatter_rows[_grid(group, len(slots))](
                group[0].into, table, slots, found, len(slots),
                D=found.shape[-1], DP=_padded(found.shape[-1]), ALIGN=align, ROWS=_ROWS,
            )  # fmt: skip


def _batches(rows: Sequence[Moving], num_moved: int) -> Iterator[list[Moving]]:
    """Whole layers together, as many as may wait at once."""
    batch: list[Moving] = []
    size = 0
    for _, group in groupby(sorted(rows, key=lambda x: x.layer), key=lambda x: x.layer):
        layer = list(group)
        more = sum(x.into.shape[0] * num_moved * x.into.shape[2] * x.into.element_size() for x in layer)
        if batch and size + more > _TAKEN_BYTES:
            yield batch
            batch, size = [], 0
        batch += layer
        size += more
    if batch and num_moved:
        yield batch


def _kind(x: Moving) -> Kind:
    """What a launch is compiled for; whether rows are turned at all, and not by how much."""
    layout = None if x.spin is None else (len(x.spin.frequencies), x.spin.start, x.spin.interleaved)
    return x.into.dtype, x.into.shape[0], x.into.shape[2], layout


def _kinds(rows: Sequence[Moving]) -> Iterator[tuple[Kind, Iterator[Moving]]]:
    return groupby(sorted(rows, key=lambda x: repr(_kind(x))), key=_kind)


def _padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _grid(group: Sequence[Moving], num_moved: int) -> tuple[int, int, int]:
    return -(-num_moved // _ROWS), group[0].into.shape[0], len(group)


def _table(
    group: Sequence[Moving], sources: torch.Tensor, spins: dict[Spin, int]
) -> tuple[torch.Tensor, int]:
    """Where each tensor lies, from the first one's memory on, and what all that is a multiple of."""
    base, table = group[0].into, []
    size = base.element_size()
    for x in group:
        line = []
        for t in (x.held, x.fresh, x.into):
            line += [(t.data_ptr() - base.data_ptr()) // size if t.numel() else 0, t.stride(0), t.stride(1)]
        pairs = len(x.spin.frequencies) if x.spin is not None else 0
        spin = pairs * spins[x.spin] if x.spin is not None else 0
        table.append([*line, x.layer * sources.stride(0), spin, int(x.is_turned)])
    align = gcd(16 // size, base.data_ptr() // size, *(n for line in table for n in line[:9]))
    return torch.tensor(table, dtype=torch.int64).to(base.device, non_blocking=True), align


def _gather(
    group: list[Moving], slots: torch.Tensor, sources: torch.Tensor, num_before: int
) -> tuple[list[Moving], torch.Tensor, int, torch.Tensor]:
    """A kind's tensors, their table, and their rows for the slots: [J, K, m, D]."""
    base = group[0].into
    spins = {spin: i for i, spin in enumerate(dict.fromkeys(x.spin for x in group if x.spin is not None))}
    table, align = _table(group, sources, spins)
    found = base.new_empty((len(group), base.shape[0], len(slots), base.shape[2]))
    _, _, dim, layout = _kind(group[0])
    pairs, start, interleaved = layout or (0, 0, False)
    turns = torch.tensor([spin.frequencies for spin in spins] or [0.0], dtype=torch.float64) / tau
    kernel.gather_rows[_grid(group, len(slots))](
        base, table, sources, sources.stride(1) if sources.shape[1] > 1 else 0, slots,
        turns.to(base.device, non_blocking=True), found, len(slots), num_before,
        D=dim, DP=_padded(dim), PAIRS=pairs, START=start, INTERLEAVED=interleaved, ALIGN=align, ROWS=_ROWS,
    )  # fmt: skip
    return group, table, align, found
