"""Rows that go to other slots, keys turned on the way, against gather, rotate and assignment in PyTorch.

Bytes are those of the rows that move, read once and written once; the fraction is of the device's copy rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernels_parts.clock import turns
from kernels_parts.limits import dtype_of, limits

from kvrag_kernels._backend import backend, has_triton, is_interpreting, using
from kvrag_kernels.move_rows import Moving, Places, Spin, move_rows, move_rows_reference

NAME = "moving rows"

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """Layers, key heads, head size, slots, and how many of them are written."""

    what: str
    layers: int
    heads: int
    dim: int
    slots: int
    moved: int


def _cases(device: torch.device, small: bool) -> list[Case]:
    if small:
        return [Case("tiny", 2, 2, 16, 64, 20)]
    if device.type == "cuda":
        return [
            Case("cascade, stride 4096", 4, 8, 128, 65_540, 8192),
            Case("cascade, decode", 32, 8, 128, 65_540, 2),
            Case("ladder, all behind a cut", 4, 8, 128, 16_384, 12_288),
        ]
    return [
        Case("cascade, stride 256", 4, 2, 64, 2052, 480),
        Case("cascade, decode", 16, 2, 64, 2052, 2),
        Case("ladder, all behind a cut", 4, 2, 64, 2052, 1600),
    ]


def _memory(case: Case, device: torch.device) -> tuple[list[Moving], Places, int]:
    """Random rows, sources, and the bytes that move."""
    made = {"device": device, "dtype": dtype_of(device)}
    spin = Spin(tuple(500_000.0 ** (-2 * i / case.dim) for i in range(case.dim // 2)))
    rows = []
    for layer in range(case.layers):
        keys, values, raw = (torch.randn(case.heads, case.slots, case.dim, **made) for _ in range(3))
        fresh = torch.randn(case.heads, case.moved, case.dim, **made)
        rows.append(Moving(layer, values, values, fresh))
        if keys.dtype == torch.float32:
            rows.append(Moving(layer, keys, keys, fresh, spin, is_turned=True))
        else:
            rows += [Moving(layer, keys, raw, fresh, spin), Moving(layer, raw, raw, fresh)]
    slots = torch.randperm(case.slots, device=device)[: case.moved].sort().values
    ends = case.slots + case.moved
    sources = torch.randint(ends, (case.layers, case.heads, case.moved), device=device)
    size = rows[0].into.element_size()
    return rows, Places(slots, sources, case.slots), 2 * len(rows) * case.heads * case.moved * case.dim * size


def run(device: torch.device, small: bool) -> list[Row]:
    """One row per case; in the smallest form the kernel also goes through its interpreter."""
    found = [_measured(case, device, small) for case in _cases(device, small)]
    if small and device.type == "cpu" and has_triton() and is_interpreting():
        with using("triton"):
            found.append(_measured(Case("tiny", 1, 1, 16, 20, 6), device, small))
    return found


def _measured(case: Case, device: torch.device, small: bool) -> Row:
    rows, places, num_bytes = _memory(case, device)
    sides = {
        "ours": lambda: move_rows(rows, places),
        "in PyTorch": lambda: move_rows_reference(rows, places),
    }
    took = turns(sides, device, repeat=2 if small else 20)
    return {
        "backend": backend(device),
        "what": case.what,
        "layers": case.layers,
        "rows per head": case.moved,
        "ours ms": 1e3 * took["ours"],
        "in PyTorch ms": 1e3 * took["in PyTorch"],
        "GB/s": num_bytes / took["ours"] / 1e9,
        "of copy rate": num_bytes / took["ours"] / limits(device, small).copy,
        "times faster": took["in PyTorch"] / took["ours"],
    }
