"""A linear layer of a few rows on a CPU: whichever of PyTorch's two libraries is faster for so many.

By a matrix that does not fit into a core's own memory, MKL, which PyTorch calls for float32, multiplies 4 to
some dozens of rows at half the rate of reading that it reaches with one; oneDNN, which PyTorch calls for 16
bits, does better, without another copy of the weights. Such are the tokens of answers that are written
together, and those of a question.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from kvrag_kernels._backend import backend

# Where oneDNN was faster: benchmarks/LOG.md has the table.
_LEAST_ROWS, _MOST_ROWS = 4, 256
_LEAST_WEIGHTS = 1 << 20


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, which defines it, up to rounding.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O].
    """
    if not is_few(x.numel() // max(1, x.shape[-1])) or not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def is_few(num_rows: int) -> bool:
    """Whether so many rows may be faster another way than PyTorch's own."""
    return _LEAST_ROWS <= num_rows <= _MOST_ROWS


def is_large(weight: torch.Tensor) -> bool:
    """Whether so many weights may be."""
    return weight.numel() >= _LEAST_WEIGHTS and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        is_large(weight)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and backend(x.device) != "reference"
        and has_both()
    )


@cache
def has_both() -> bool:
    """Whether this PyTorch has both libraries, and the operator, which its compiler uses, computes."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    x, weight = torch.ones(2, 3), torch.ones(5, 3)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # no such operator, or one of another form
        return False
    return torch.equal(found, F.linear(x, weight))
