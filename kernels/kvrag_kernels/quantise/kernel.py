"""Quantising and unpacking on a GPU: every row is read once and written once, its rotation on the way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from kvrag_kernels.quantise.blocks import INT4, packed_values, pairs_of, turned_keys
from kvrag_kernels.quantise.reference import quantise_reference
from kvrag_kernels.quantise.types import BITS, GROUP, Form, OutOfRange, Quantised, width
from kvrag_kernels.turning import Turn

_FORMS = {"fp8": 1, "int8": 2, "int4": 3}
_SPLITS = 32  # programs that look for a head's largest keys


@triton.jit
def dequantise_kernel(
    KEYS, VALUES, KEY_SCALE, KEY_ZERO, KEY_REST, VALUE_SCALE, VALUE_ZERO, COS, SIN, OUT_KEYS, OUT_VALUES,
    num_rows, full, key_head, value_head, key_scale_head, rest_head, value_scale_head,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    START: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, FORM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head, [K, n, D] and [K, n, Dv]."""
    block, head = tl.program_id(0), tl.program_id(1)
    j = block * BN + tl.arange(0, BN)
    inside = j < num_rows
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    place = (head * num_rows + j).to(tl.int64)
    keys = turned_keys(
        KEYS + head * key_head, D if FORM != INT4 else D // 2, KEY_SCALE + head * key_scale_head,
        KEY_ZERO + head * key_scale_head, KEY_REST + head * rest_head, full, block, inside, COS, SIN,
        num_rows, D, DP, R, START, INTERLEAVED, ROTATED, FORM, BN,
    )  # fmt: skip
    at = place[:, None] * D + d[None, :]
    tl.store(OUT_KEYS + at, keys.to(OUT_KEYS.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    values = packed_values(
        VALUES + head * value_head, DV if FORM != INT4 else DV // 2, VALUE_SCALE + head * value_scale_head,
        VALUE_ZERO + head * value_scale_head, j, inside, DV, DVP, FORM, VALUE_WIDTH,
    )  # fmt: skip
    at = place[:, None] * DV + dv[None, :]
    tl.store(
        OUT_VALUES + at, values.to(OUT_VALUES.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :]
    )


@triton.jit
def flat_keys(
    keys, row, j, ok, channels, COS, SIN,
    D: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Rows `j` [N] and `channels` [C] of one head, their rotation undone, float32."""
    seen = ok[:, None] & (channels < D)[None, :]
    x = tl.load(keys + j[:, None] * row + channels[None, :], mask=seen, other=0.0).to(tl.float32)
    if ROTATED:
        rotated, pair, partner, sign = pairs_of(channels, R, START, INTERLEAVED)
        other = tl.load(keys + j[:, None] * row + partner[None, :], mask=seen, other=0.0).to(tl.float32)
        at = j[:, None] * R + pair[None, :]
        turned = ok[:, None] & rotated[None, :]
        cos = tl.load(COS + at, mask=turned, other=1.0)
        sin = tl.load(SIN + at, mask=turned, other=0.0)
        x = x * cos - other * (sign[None, :] * sin)
    return x


@triton.jit
def nearest(x):
    """Rounded to the nearest integer, halves to even, for magnitudes below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(x):
    """Bits of the nearest eight-bit float; magnitudes up to 448 on any device."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)  # the bias falls from 127 to 7
    small = nearest(tl.abs(x) * 512.0).to(tl.int32)  # below 2**-6 steps are all alike
    found = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    return (((bits >> 24) & 0x80) | found).to(tl.uint8)


@triton.jit
def largest_kernel(
    KEYS, COS, SIN, LARGEST, num_rows, key_head, key_row,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Largest magnitude of each channel among one program's share of a head's rows: [K, programs, D]."""
    part, head = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    d = tl.arange(0, DP)
    largest = tl.zeros((DP,), tl.float32)
    for block in range(part, tl.cdiv(num_rows, BN), parts):
        j = block * BN + tl.arange(0, BN)
        keys = flat_keys(
            KEYS + head * key_head, key_row, j, j < num_rows, d, COS, SIN, D, R, START, INTERLEAVED, ROTATED
        )
        largest = tl.maximum(largest, tl.max(tl.abs(keys), 0))
    tl.store(LARGEST + (head * parts + part) * D + d, largest, mask=d < D)


@triton.jit
def fp8_kernel(
    KEYS, VALUES, COS, SIN, KEY_SCALE, OUT_KEYS, OUT_VALUES, VALUE_SCALE,
    num_rows, key_head, key_row, value_head, value_row,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    START: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head, given the scales of its keys' channels."""
    head = tl.program_id(1)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = j < num_rows
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    keys = flat_keys(
        KEYS + head * key_head, key_row, j, inside, d, COS, SIN, D, R, START, INTERLEAVED, ROTATED
    )
    scale = tl.load(KEY_SCALE + head * D + d, mask=d < D, other=1.0)
    place = (head * num_rows + j).to(tl.int64)
    bits = to_e4m3(tl.div_rn(keys, tl.broadcast_to(scale[None, :], (BN, DP))))
    tl.store(OUT_KEYS + place[:, None] * D + d[None, :], bits, mask=inside[:, None] & (d < D)[None, :])
    seen = inside[:, None] & (dv < DV)[None, :]
    at = head * value_head + j[:, None] * value_row + dv[None, :]
    values = tl.load(VALUES + at, mask=seen, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, tl.full((BN,), 448.0, tl.float32)))
    tl.store(VALUE_SCALE + place, scale, mask=inside)
    bits = to_e4m3(tl.div_rn(values, tl.broadcast_to(scale[:, None], (BN, DVP))))
    tl.store(OUT_VALUES + place[:, None] * DV + dv[None, :], bits, mask=seen)


@triton.jit
def scales_of(low, high, steps: tl.constexpr):
    """Zero point and scale of a group, in half precision, and what its elements are divided by."""
    zero = low.to(tl.float16)
    span = high - zero.to(tl.float32)
    scale = tl.div_rn(span, tl.zeros_like(span) + steps).to(tl.float16)
    wide = scale.to(tl.float32)
    return zero, scale, tl.where(wide == 0, 1.0, wide)


@triton.jit
def steps_above(x, zero, divisor, steps: tl.constexpr):
    """Steps of an element above its group's zero point, uint8."""
    wanted = nearest(tl.div_rn(x - zero.to(tl.float32), divisor + tl.zeros_like(x)))
    return tl.minimum(tl.maximum(wanted, 0.0), steps).to(tl.uint8)


@triton.jit
def keys_kernel(
    KEYS, COS, SIN, OUT, ZERO, SCALE, REST, num_rows, num_groups, key_head, key_row,
    D: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Integers of 32 keys of one head, or the keys themselves where they fill no group."""
    group, head = tl.program_id(0), tl.program_id(1)
    steps: tl.constexpr = 2**BITS - 1
    rows = tl.arange(0, GROUP)
    j = group * GROUP + rows
    inside = j < num_rows
    fills = j // GROUP < num_groups
    base = KEYS + head * key_head
    num_rest = num_rows - num_groups * GROUP
    step: tl.constexpr = 2 if FORM == INT4 else 1
    c = tl.arange(0, CP)
    packed = tl.zeros((GROUP, CP), tl.uint8)
    for part in tl.static_range(step):
        channels = step * c + part
        known = channels < D
        scaled = known & (channels * 0 + group < num_groups)
        x = flat_keys(base, key_row, j, inside, channels, COS, SIN, D, R, START, INTERLEAVED, ROTATED)
        zero, scale, divisor = scales_of(tl.min(x, 0), tl.max(x, 0), steps)
        at = (head * num_groups + group) * D + channels
        tl.store(ZERO + at, zero, mask=scaled)
        tl.store(SCALE + at, scale, mask=scaled)
        packed = packed | (steps_above(x, zero[None, :], divisor[None, :], steps) << (4 * part))
        rest = (head * num_rest + rows)[:, None] * D + channels[None, :]
        kept = (inside & (j // GROUP >= num_groups))[:, None] & known[None, :]
        tl.store(REST + rest, x.to(REST.dtype.element_ty), mask=kept)
    at = (head * num_groups * GROUP + j)[:, None] * (D // step) + c[None, :]
    tl.store(OUT + at, packed, mask=(inside & fills)[:, None] & (c < D // step)[None, :])


@triton.jit
def values_kernel(
    VALUES, OUT, ZERO, SCALE, num_rows, value_head, value_row,
    DV: tl.constexpr, W: tl.constexpr, GP: tl.constexpr, WP: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Integers of a block of values of one head; a group is W channels of one row."""
    head = tl.program_id(1)
    steps: tl.constexpr = 2**BITS - 1
    step: tl.constexpr = 2 if FORM == INT4 else 1
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = j < num_rows
    groups, c = tl.arange(0, GP), tl.arange(0, WP)
    known = inside[:, None] & (groups < DV // W)[None, :]
    seen = known[:, :, None] & (c < W // step)[None, None, :]
    low = tl.full((BN, GP), float("inf"), tl.float32)
    high = tl.full((BN, GP), float("-inf"), tl.float32)
    at = (
        head * value_head + j[:, None, None] * value_row + groups[None, :, None] * W + step * c[None, None, :]
    )
    for part in tl.static_range(step):
        x = tl.load(VALUES + at + part, mask=seen, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(seen, x, float("inf")), 2))
        high = tl.maximum(high, tl.max(tl.where(seen, x, float("-inf")), 2))
    low, high = tl.where(known, low, 0.0), tl.where(known, high, 0.0)
    zero, scale, divisor = scales_of(low, high, steps)
    place = (head * num_rows + j).to(tl.int64)
    where = place[:, None] * (DV // W) + groups[None, :]
    tl.store(ZERO + where, zero, mask=known)
    tl.store(SCALE + where, scale, mask=known)
    packed = tl.zeros((BN, GP, WP), tl.uint8)
    for part in tl.static_range(step):
        x = tl.load(VALUES + at + part, mask=seen, other=0.0).to(tl.float32)
        packed = packed | (steps_above(x, zero[:, :, None], divisor[:, :, None], steps) << (4 * part))
    where = place[:, None, None] * (DV // step) + groups[None, :, None] * (W // step) + c[None, None, :]
    tl.store(OUT + where, packed, mask=seen)


def quantise_triton(keys: torch.Tensor, values: torch.Tensor, form: Form, turn: Turn | None) -> Quantised:
    """Rows in fewer bits, bit for bit as the definition gives them where both round alike.

    The plain way is taken for channels that do not lie side by side and for groups of four-bit values that
    share bytes.
    """
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or (form == "int4" and width(values.shape[-1]) % 2):
        return quantise_reference(keys, values, form, turn)
    turn = _contiguous(turn)
    with _on(keys.device):
        return _fp8(keys, values, turn) if form == "fp8" else _integers(keys, values, form, turn)


def dequantise_triton(
    packed: Quantised, dtype: torch.dtype, turn: Turn | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows again."""
    parts = packed.tensors
    if not all(part[0].is_contiguous() for part in parts):
        packed = Quantised(packed.form, *(part.contiguous() for part in parts))
    turn = _contiguous(turn)
    keys, values = packed.keys, packed.values
    if packed.form == "fp8":
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    heads, num_rows = values.shape[:2]
    size, value_size = packed.key_size, packed.value_size
    out_keys = torch.empty((heads, num_rows, size), dtype=dtype, device=keys.device)
    out_values = torch.empty((heads, num_rows, value_size), dtype=dtype, device=keys.device)
    rest = packed.key_rest if packed.key_rest is not None else out_keys
    block = 32
    with _on(keys.device):
        dequantise_kernel[(triton.cdiv(num_rows, block), heads)](
            keys, values, packed.key_scale, _or(packed.key_zero, packed.key_scale), rest, packed.value_scale,
            _or(packed.value_zero, packed.value_scale), *_tables(turn, packed.key_scale), out_keys,
            out_values, num_rows, keys.shape[1], keys.stride(0), values.stride(0),
            packed.key_scale.stride(0), rest.stride(0), packed.value_scale.stride(0),
            D=size, DV=value_size, DP=_padded(size), DVP=_padded(value_size),
            FORM=_FORMS[packed.form], VALUE_WIDTH=width(value_size), BN=block, **_rotation(turn),
        )  # fmt: skip
    return out_keys, out_values


def _fp8(keys: torch.Tensor, values: torch.Tensor, turn: Turn | None) -> Quantised:
    heads, num_rows, size = keys.shape
    value_size, block = values.shape[2], 32
    rotation, tables = _rotation(turn), _tables(turn, keys)
    parts = min(_SPLITS, triton.cdiv(num_rows, block))
    largest = torch.empty((heads, parts, size), dtype=torch.float32, device=keys.device)
    largest_kernel[(parts, heads)](
        keys, *tables, largest, num_rows, *keys.stride()[:2], D=size, DP=_padded(size), BN=block, **rotation
    )
    largest = largest.amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / torch.finfo(torch.float8_e4m3fn).max)
    out_keys, out_values = (torch.empty(x.shape, dtype=torch.uint8, device=x.device) for x in (keys, values))
    value_scale = torch.empty((heads, num_rows, 1), dtype=torch.float32, device=keys.device)
    fp8_kernel[(triton.cdiv(num_rows, block), heads)](
        keys, values, *tables, scale, out_keys, out_values, value_scale, num_rows, *keys.stride()[:2],
        *values.stride()[:2],
        D=size, DV=value_size, DP=_padded(size), DVP=_padded(value_size), BN=block, **rotation,
    )  # fmt: skip
    stored = torch.float8_e4m3fn
    return Quantised("fp8", out_keys.view(stored), out_values.view(stored), scale, value_scale)


def _integers(keys: torch.Tensor, values: torch.Tensor, form: Form, turn: Turn | None) -> Quantised:
    (heads, num_rows, size), value_size, group = keys.shape, values.shape[2], width(values.shape[2])
    groups, step, bits = num_rows // GROUP, 8 // BITS[form], BITS[form]

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    packed = Quantised(
        form,
        empty(heads, groups * GROUP, size // step, dtype=torch.uint8),
        empty(heads, num_rows, value_size // step, dtype=torch.uint8),
        empty(heads, groups, size, dtype=torch.float16),
        empty(heads, num_rows, value_size // group, dtype=torch.float16),
        empty(heads, groups, size, dtype=torch.float16),
        empty(heads, num_rows, value_size // group, dtype=torch.float16),
        empty(heads, num_rows - groups * GROUP, size, dtype=keys.dtype),
    )
    keys_kernel[(triton.cdiv(num_rows, GROUP), heads)](
        keys, *_tables(turn, keys), packed.keys, packed.key_zero, packed.key_scale, packed.key_rest,
        num_rows, groups, *keys.stride()[:2], D=size, CP=_padded(size // step), FORM=_FORMS[form], BITS=bits,
        GROUP=GROUP, **_rotation(turn),
    )  # fmt: skip
    block = 16
    values_kernel[(triton.cdiv(num_rows, block), heads)](
        values, packed.values, packed.value_zero, packed.value_scale, num_rows, *values.stride()[:2],
        DV=value_size, W=group, GP=triton.next_power_of_2(value_size // group),
        WP=triton.next_power_of_2(group // step), FORM=_FORMS[form], BITS=bits, BN=block,
    )  # fmt: skip
    _check_range(packed, keys, values)
    return packed


def _check_range(packed: Quantised, keys: torch.Tensor, values: torch.Tensor) -> None:
    scales = (packed.key_scale, packed.key_zero, packed.value_scale, packed.value_zero)
    if not all(bool(x.isfinite().all()) for x in scales if x is not None):
        largest = max(keys.abs().max().item(), values.abs().max().item())
        raise OutOfRange(f"{packed.form} cannot hold rows of up to {largest:.3g}")


def _rotation(turn: Turn | None) -> dict[str, int | bool]:
    """How channels are paired, for the kernels."""
    return {
        "R": turn.cos.shape[-1] if turn is not None else 1,
        "START": turn.start if turn is not None else 0,
        "INTERLEAVED": turn is not None and turn.interleaved,
        "ROTATED": turn is not None,
    }


def _tables(turn: Turn | None, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines; something to point to where nothing is rotated."""
    return (turn.cos, turn.sin) if turn is not None else (other, other)


def _contiguous(turn: Turn | None) -> Turn | None:
    return turn and Turn(turn.cos.contiguous(), turn.sin.contiguous(), turn.start, turn.interleaved)


def _or(found: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if found is None else found


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
