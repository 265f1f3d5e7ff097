"""A cascade that takes in a stride: who stays, against the token-by-token rule and one update per token.

Rings are full. "serial" is the definition in Python on one head, scaled to all; "one by one" is the same op
called for every token: what a serial update on a GPU has to launch at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernels_parts.clock import seconds

from kvrag_kernels._backend import backend
from kvrag_kernels.cascade_update import (
    cascade_update,
    cascade_update_reference,
    cascade_update_vectorised,
)

NAME = "cascade update"

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """Layers, key heads, slots of each of four sub-caches, and the stride."""

    layers: int
    heads: int
    width: int
    stride: int


def _cases(device: torch.device, small: bool) -> list[Case]:
    if small:
        return [Case(2, 2, 32, 40)]
    strides = (1, 256, 4096) if device.type == "cuda" else (1, 256, 1024)
    return [Case(32, 8, 4096, stride) for stride in strides]


def run(device: torch.device, small: bool) -> list[Row]:
    """One row per stride."""
    return [_measured(case, device, small) for case in _cases(device, small)]


def _measured(case: Case, device: torch.device, small: bool) -> Row:
    shape = (case.layers, case.heads)
    scores = torch.rand(*shape, 4 * case.width, device=device)
    fresh = torch.rand(*shape, case.stride, device=device)
    rings = ((case.width,) * 4, (case.width // 3,) * 4, 20 * case.width)
    options = {"periods": (1, 2, 4, 8), "width": case.width}
    repeat = 2 if small else 10

    def one_by_one() -> None:
        for i in range(case.stride):
            cascade_update(scores, fresh[..., i : i + 1], *rings, **options)

    def serial() -> None:
        cascade_update_reference(scores[:1, :1].cpu(), fresh[:1, :1].cpu(), *rings, **options)

    ours = seconds(lambda: cascade_update(scores, fresh, *rings, **options), device, repeat=repeat)
    plain = seconds(
        lambda: cascade_update_vectorised(scores, fresh, *rings, **options), device, repeat=repeat
    )
    definition = seconds(serial, torch.device("cpu"), repeat=2, warm=1) * case.layers * case.heads
    each = seconds(one_by_one, device, repeat=1, warm=1)
    return {
        "backend": backend(device),
        "layers": case.layers,
        "key heads": case.heads,
        "slots": 4 * case.width,
        "stride": case.stride,
        "ours ms": 1e3 * ours,
        "in PyTorch ms": 1e3 * plain,
        "one by one ms": 1e3 * each,
        "serial ms": 1e3 * definition,
        "faster than one by one": each / ours,
        "faster than serial": definition / ours,
    }
