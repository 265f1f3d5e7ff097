"""Rows in fewer bits: how the store writes them, and how attention reads them without unpacking."""

from __future__ import annotations

import torch

from kvrag_kernels._backend import backend
from kvrag_kernels.quantise.reference import dequantise_reference, quantise_reference
from kvrag_kernels.quantise.types import BITS, GROUP, Form, OutOfRange, Quantised, width
from kvrag_kernels.turning import Turn

__all__ = [
    "BITS",
    "GROUP",
    "Form",
    "OutOfRange",
    "Quantised",
    "dequantise",
    "dequantise_reference",
    "quantise",
    "quantise_reference",
    "width",
]


def quantise(keys: torch.Tensor, values: torch.Tensor, form: Form, turn: Turn | None = None) -> Quantised:
    """One layer's rows in fewer bits.

    Args:
        keys: [K, n, D], any float type; contiguous or not.
        values: [K, n, Dv], same type.
        form: "fp8", "int8" or "int4" (even head sizes only).
        turn: the rotation that the keys have, [1, n, R]; it is undone first. None: they have none.

    Returns:
        See `Quantised`.

    Raises:
        OutOfRange: the rows are too large for scales in float16 (never with fp8).
    """
    if backend(keys.device) == "triton" and keys.shape[1]:
        from kvrag_kernels.quantise import kernel  # noqa: PLC0415 - triton is an extra

        return kernel.quantise_triton(keys, values, form, turn)
    return quantise_reference(keys, values, form, turn)


def dequantise(
    packed: Quantised, dtype: torch.dtype, turn: Turn | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows again, as near as the form allows.

    Args:
        packed: from `quantise`.
        dtype: of the rows.
        turn: the rotation that the keys are to have, [1, n, R], applied in float32 before the one rounding;
            None: none.

    Returns:
        Keys [K, n, D] and values [K, n, Dv].
    """
    if backend(packed.keys.device) == "triton" and packed.num_rows:
        from kvrag_kernels.quantise import kernel  # noqa: PLC0415 - triton is an extra

        return kernel.dequantise_triton(packed, dtype, turn)
    return dequantise_reference(packed, dtype, turn)
