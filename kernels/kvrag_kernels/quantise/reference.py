"""The definition of the forms in fewer bits: plain PyTorch on any device."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvrag_kernels.quantise.types import BITS, GROUP, Form, OutOfRange, Quantised, width
from kvrag_kernels.turning import Turn, turn_query

_FP8 = torch.float8_e4m3fn


def turned_rows(rows: torch.Tensor, turn: Turn | None, *, back: bool = False) -> torch.Tensor:
    """Rotate rows by their positions, or back.

    Args:
        rows: [K, n, D], float32.
        turn: [1, n, R]; None for rows without positions.
        back: undo it.
    """
    if turn is None:
        return rows
    return turn_query(rows[None], replace(turn, sin=-turn.sin) if back else turn, 1)[0, 0]


def quantise_reference(
    keys: torch.Tensor, values: torch.Tensor, form: Form, turn: Turn | None = None
) -> Quantised:
    """Rows in fewer bits; see `quantise` for the arguments."""
    flat, rows = turned_rows(keys.float(), turn, back=True), values.float()
    if form == "fp8":
        return _quantise_fp8(flat, rows)
    return _quantise_integers(flat, rows, form, keys.dtype)


def dequantise_reference(
    packed: Quantised, dtype: torch.dtype, turn: Turn | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows again; see `dequantise` for the arguments."""
    keys, values = _fp8_rows(packed) if packed.form == "fp8" else _integer_rows(packed)
    return turned_rows(keys, turn).to(dtype), values.to(dtype)


def _quantise_fp8(keys: torch.Tensor, values: torch.Tensor) -> Quantised:
    """Divide by the largest magnitude, so that the format's whole range is used."""
    key_scale, value_scale = _fp8_scale(keys, 1), _fp8_scale(values, 2)
    return Quantised(
        "fp8", (keys / key_scale).to(_FP8), (values / value_scale).to(_FP8), key_scale, value_scale
    )


def _fp8_scale(rows: torch.Tensor, dim: int) -> torch.Tensor:
    largest = rows.abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1.0, largest / torch.finfo(_FP8).max)


def _fp8_rows(packed: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    return packed.keys.float() * packed.key_scale, packed.values.float() * packed.value_scale


def _quantise_integers(keys: torch.Tensor, values: torch.Tensor, form: Form, dtype: torch.dtype) -> Quantised:
    """Round to the nearest of 256 or 16 steps between a group's smallest and largest element."""
    heads, num_rows, size = keys.shape
    full = num_rows // GROUP * GROUP
    key_zero, key_scale, key_steps = _steps(keys[:, :full].reshape(heads, -1, GROUP, size), 2, form)
    value_zero, value_scale, value_steps = _steps(
        values.unflatten(-1, (-1, width(values.shape[-1]))), -1, form
    )
    return Quantised(
        form,
        _joined(key_steps.reshape(heads, full, size), form),
        _joined(value_steps.reshape(values.shape), form),
        key_scale[:, :, 0],
        value_scale[..., 0],
        key_zero[:, :, 0],
        value_zero[..., 0],
        keys[:, full:].to(dtype),
    )


def _steps(x: torch.Tensor, dim: int, form: Form) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero points and scales, float16, size 1 along `dim`, and steps above the zero point, uint8.

    Raises:
        OutOfRange: float16 does not reach as far as the rows do.
    """
    steps = 2 ** BITS[form] - 1
    if not x.numel():
        edge = x.narrow(dim, 0, 1).half()
        return edge, edge, x.to(torch.uint8)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.half()
    # The scale has to reach the largest element from the rounded zero point.
    scale = ((high - zero.float()) / steps).half()
    if not (zero.isfinite() & scale.isfinite()).all():
        raise OutOfRange(f"{form} cannot hold rows of up to {x.abs().max().item():.3g}")
    divisor = torch.where(scale == 0, 1.0, scale.float())
    return zero, scale, ((x - zero.float()) / divisor).round().clamp(0, steps).to(torch.uint8)


def _integer_rows(packed: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    key_zero, value_zero, rest = packed.key_zero, packed.value_zero, packed.key_rest
    if key_zero is None or value_zero is None or rest is None:
        raise ValueError(f"rows of {packed.form} need zero points and the rows that fill no group")
    keys = _parted(packed.keys, packed.form).unflatten(1, (-1, GROUP)).float()
    keys = keys.mul_(packed.key_scale[:, :, None].float()).add_(key_zero[:, :, None].float()).flatten(1, 2)
    values = _parted(packed.values, packed.form).unflatten(-1, (packed.value_scale.shape[-1], -1)).float()
    values = values.mul_(packed.value_scale[..., None].float()).add_(value_zero[..., None].float())
    return torch.cat((keys, rest.float()), dim=1), values.flatten(-2)


def _joined(x: torch.Tensor, form: Form) -> torch.Tensor:
    return x if form == "int8" else x[..., ::2] | x[..., 1::2] << 4


def _parted(x: torch.Tensor, form: Form) -> torch.Tensor:
    return x if form == "int8" else torch.stack((x & 15, x >> 4), dim=-1).flatten(-2)
