"""Linear layers of 1 to 64 rows on a CPU: as kvrag calls them, and as PyTorch does by itself.

The floor is the larger of the weights, read once at the rate of one row ("products"), and of the operations.
Every layer is another one, so that no weight is in the processor's memory already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels_parts.clock import seconds, turns
from kernels_parts.limits import limits

from kvrag_kernels.linear import linear

NAME = "linear"

Row = dict[str, object]

_BYTES = 500 << 20  # of all weights together: more than any processor remembers


def run(device: torch.device, small: bool) -> list[Row]:
    """One row per shape and number of rows; nothing on a GPU, where PyTorch's own is what is called."""
    if device.type != "cpu":
        return []
    shapes = [(1024, 1024)] if small else [(896, 4864), (4864, 896), (4096, 4096)]
    counts = (1, 8) if small else (1, 2, 4, 8, 16, 32, 64)
    return [row for shape in shapes for row in _measured(*shape, counts, device, small)]


@torch.inference_mode()
def _measured(wide: int, out: int, counts: tuple[int, ...], device: torch.device, small: bool) -> list[Row]:
    num = 2 if small else _BYTES // (4 * wide * out)
    weights = [torch.randn(out, wide) for _ in range(num)]
    found: list[Row] = []
    one = torch.randn(1, wide)
    per_matrix = seconds(lambda: [F.linear(one, w) for w in weights], device, repeat=3 if small else 7) / num
    for count in counts:
        x = torch.randn(count, wide)
        took = turns(
            {
                "ours": lambda x=x: [linear(x, w) for w in weights],
                "PyTorch": lambda x=x: [F.linear(x, w) for w in weights],
            },
            device,
            repeat=2 if small else 5,
        )
        ours, other = took["ours"] / num, took["PyTorch"] / num
        least = max(per_matrix, 2 * count * wide * out / limits(device, small).flops[torch.float32])
        found.append(
            {
                "in": wide,
                "out": out,
                "rows": count,
                "ours us": ours * 1e6,
                "PyTorch us": other * 1e6,
                "of the limit": least / ours,
                "PyTorch's, of the limit": least / other,
                "times faster": other / ours,
            }
        )
    return found
