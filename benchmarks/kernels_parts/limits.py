"""What the device can do at most, in bytes and in products per second; every figure is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kernels_parts.clock import seconds

NAME = "limits"


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured, not taken from a data sheet.

    Attributes:
        copy: bytes read and written per second by a large copy.
        read: bytes read per second by a large sum: what a kernel that only reads can reach.
        flops: floating-point operations per second of a large matrix product, by element type.
    """

    copy: float
    read: float
    flops: dict[torch.dtype, float]

    def seconds(self, num_bytes: float, num_flops: float, dtype: torch.dtype) -> float:
        """The least time for reading so many bytes and computing so much, both at once."""
        return max(num_bytes / self.copy, num_flops / self.flops[dtype])


def dtype_of(device: torch.device) -> torch.dtype:
    """The element type that is measured: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def weight_bytes(network: Any, num_tokens: int) -> int:
    """Bytes of weights that a pass over so many tokens has to read.

    Every matrix once, and of the table of embeddings one row per token; a head that shares the table
    multiplies by all of it, so there it counts as a matrix.

    Args:
        network: a transformers model.
        num_tokens: of the pass.
    """
    table = network.get_input_embeddings().weight
    head = network.get_output_embeddings()
    every = sum(parameter.nbytes for parameter in network.parameters())
    if head is not None and head.weight is table:
        return every
    return every - table.nbytes + min(num_tokens, len(table)) * table[0].nbytes


@cache
def limits(device: torch.device, small: bool) -> Limits:
    """Measure a device, once per process.

    Args:
        device: to measure.
        small: little memory and few repetitions.
    """
    large = 4 << 20 if small else (1 << 30 if device.type == "cuda" else 128 << 20)
    source = torch.ones(large, dtype=torch.uint8, device=device)  # zeros may all be one page
    into = torch.empty_like(source)
    numbers = source.view(torch.int64)
    repeat = 3 if small else 20
    copied = seconds(lambda: into.copy_(source), device, repeat=repeat)
    read = seconds(numbers.sum, device, repeat=repeat)
    side = 128 if small else (8192 if device.type == "cuda" else 1024)
    flops = {}
    for dtype in {dtype_of(device), torch.float32}:
        a = torch.randn(side, side, device=device).to(dtype)
        flops[dtype] = 2 * side**3 / seconds(lambda a=a: a @ a, device, repeat=repeat)
    return Limits(2 * large / copied, large / read, flops)


def run(device: torch.device, small: bool) -> list[dict[str, object]]:
    """The limits as rows."""
    found = limits(device, small)
    rows: list[dict[str, object]] = [
        {"what": "copy, read and written", "GB/s": found.copy / 1e9},
        {"what": "read by a sum", "GB/s": found.read / 1e9},
    ]
    for dtype, rate in found.flops.items():
        rows.append({"what": f"matrix product, {str(dtype).removeprefix('torch.')}", "TFLOP/s": rate / 1e12})
    return rows
