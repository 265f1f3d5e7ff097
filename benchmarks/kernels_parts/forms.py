"""Rows in fewer bits: packing, unpacking, and attention that reads them as they lie.

Bytes are those read and written, once each; the fraction is that of the device's copy rate.
"""

from __future__ import annotations

from typing import Any

import torch
from kernels_parts.clock import replayed, seconds, turns
from kernels_parts.limits import dtype_of, limits
from kernels_parts.segment import attending

from kvrag_kernels import QuantisedRows, Rows, Turn
from kvrag_kernels._backend import backend
from kvrag_kernels.quantise import Form, Quantised, dequantise, quantise

NAME = "forms"

FORMS: tuple[Form, ...] = ("fp8", "int8", "int4")


def local_turn(num_rows: int, dim: int, device: torch.device) -> Turn:
    """Angles of rows one behind the other, [1, n, D / 2]."""
    frequencies = 500_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    angles = torch.arange(num_rows)[None, :, None].double() * frequencies
    return Turn(angles.cos().float().to(device), angles.sin().float().to(device))


def _num_bytes(packed: Quantised) -> int:
    return sum(part.nbytes for part in packed.tensors)


def run(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """One row per form: an eight-headed layer of many tokens, then a decode step over 16 documents of 512."""
    heads, dim, num_rows = (2, 16, 64) if small else (8, 128, 65_536 if device.type == "cuda" else 4096)
    repeat = 2 if small else (20 if device.type == "cuda" else 5)
    dtype, rate = dtype_of(device), limits(device, small).copy
    keys, values = (torch.randn(heads, num_rows, dim, device=device).to(dtype) for _ in range(2))
    turn, raw = local_turn(num_rows, dim, device), keys.nbytes + values.nbytes
    found = []
    for form in FORMS:
        packed = quantise(keys, values, form, turn)
        moved = raw + _num_bytes(packed)
        packing = seconds(lambda form=form: quantise(keys, values, form, turn), device, repeat=repeat)
        unpacking = seconds(lambda packed=packed: dequantise(packed, dtype, turn), device, repeat=repeat)
        found.append(
            {
                "form": form,
                "backend": backend(device),
                "rows": num_rows,
                "quantise of the limit": moved / packing / rate,
                "unpack of the limit": moved / unpacking / rate,
                **_attention(form, device, small, repeat),
            }
        )
    return found


def _attention(form: Form, device: torch.device, small: bool, repeat: int) -> dict[str, float]:
    """A decode step over documents in fewer bits, against the same step over plain rows."""
    shape = (2, 4, 16, 40, 2) if small else (8, 32, 128, 512, 16)
    kv_heads, heads, dim, size, count = shape
    dtype, local = dtype_of(device), local_turn(size, dim, device)
    made = [torch.randn(2, kv_heads, size, dim, device=device).to(dtype) for _ in range(count)]
    plain = [Rows(kv[0][None], kv[1][None]) for kv in made]
    packed = [QuantisedRows(quantise(kv[0], kv[1], form, local), local) for kv in made]
    query = torch.randn(1, heads, 1, dim, device=device).to(dtype)
    angles = local_turn(count, dim, device)
    turn = Turn(angles.cos.transpose(0, 1).contiguous(), angles.sin.transpose(0, 1).contiguous())
    sides = {
        name: replayed(attending(query, rows, turn, dim**-0.5), device)
        for name, rows in (("packed", packed), ("plain", plain))
    }
    times = turns(sides, device, repeat=repeat)
    num_bytes = sum(_num_bytes(rows.packed) for rows in packed)
    rate = limits(device, small).copy
    return {
        "attention of the limit": num_bytes / times["packed"] / rate,
        "plain rows / packed": times["plain"] / times["packed"],
    }
