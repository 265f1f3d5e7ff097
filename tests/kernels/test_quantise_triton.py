"""The kernels for rows in fewer bits give what the plain functions give, interpreted or on a GPU."""

from __future__ import annotations

import os
import secrets

import pytest
import torch

from kvrag_kernels import Turn
from kvrag_kernels.quantise import (
    Form,
    OutOfRange,
    Quantised,
    dequantise_reference,
    quantise,
    quantise_reference,
)

pytest.importorskip("triton", reason="the extra kvrag[triton] is not installed")

from kvrag_kernels.quantise.kernel import dequantise_triton, quantise_triton

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CPU, GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
FORMS: tuple[Form, ...] = ("fp8", "int8", "int4")

# Rows, size of a key, size of a value, pairs, first rotated channel, neighbours as pairs.
SHAPES = {
    "whole groups": (64, 16, 16, 8, 0, False),
    "a rest": (45, 16, 40, 8, 0, False),
    "fewer than a group": (7, 32, 20, 16, 0, True),
    "heads of 80": (33, 80, 80, 40, 0, False),
    "partial": (40, 24, 16, 4, 2, False),
    "partial, interleaved, odd": (40, 24, 16, 3, 5, True),
    "not rotated": (40, 16, 16, None, 0, False),
}


@pytest.fixture
def generator() -> torch.Generator:
    """Random every time; the seed is printed, and SEED=... repeats it."""
    seed = int(os.environ.get("SEED") or secrets.randbits(31))
    print(f"SEED={seed}")
    return torch.Generator().manual_seed(seed)


def made(
    shape: tuple[int, int, int, int | None, int, bool], dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, Turn | None]:
    """Keys and values of two heads as views of larger buffers, and the keys' rotation."""
    num_rows, size, value_size, pairs, start, interleaved = shape
    keys = torch.randn(2, num_rows + 3, size, generator=generator).to(dtype)[:, 3:]
    values = (torch.randn(2, num_rows + 1, value_size, generator=generator) * 3).to(dtype)[:, 1:]
    keys[:, :, 1] += 9  # a channel far from zero
    values[0, 0] = 0  # a row without a scale
    if pairs is None:
        return keys, values, None
    angles = torch.arange(num_rows)[None, :, None] * torch.rand(pairs, generator=generator)
    return keys, values, Turn(angles.cos(), angles.sin(), start, interleaved)


def on(device: str, turn: Turn | None) -> Turn | None:
    return turn and Turn(turn.cos.to(device), turn.sin.to(device), turn.start, turn.interleaved)


def steps(packed: Quantised, x: torch.Tensor) -> torch.Tensor:
    """Stored numbers as integers that grow as what they stand for does."""
    raw = x.cpu().view(torch.uint8).int()
    if packed.form == "int4":
        return torch.stack((raw & 15, raw >> 4), -1)
    return torch.where(raw > 127, 127 - raw, raw) if packed.form == "fp8" else raw


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_quantises_as_the_definition_does(
    name: str, form: Form, device: str, generator: torch.Generator
) -> None:
    """Scales to rounding; numbers but for few that lie between two and fall on the other side."""
    keys, values, turn = made(SHAPES[name], torch.float32, generator)
    expected = quantise_reference(keys, values, form, turn)
    found = quantise_triton(keys.to(device), values.to(device), form, on(device, turn))
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    for name_of in ("key_scale", "value_scale", "key_zero", "value_zero", "key_rest"):
        mine, theirs = getattr(found, name_of), getattr(expected, name_of)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            tolerance = 1e-3 if theirs.dtype == torch.float16 else 2e-6
            assert torch.allclose(mine.cpu().float(), theirs.float(), rtol=tolerance, atol=tolerance)
    for mine, theirs in ((found.keys, expected.keys), (found.values, expected.values)):
        if theirs.numel():
            away = (steps(found, mine) - steps(expected, theirs)).abs()
            assert int(away.max()) <= 1
            assert float(away.float().mean()) < 5e-3


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [n for n in SHAPES if "odd" not in n])
def test_unpacks_as_the_definition_does(
    name: str, form: Form, device: str, generator: torch.Generator
) -> None:
    keys, values, turn = made(SHAPES[name], torch.float32, generator)
    packed = quantise_reference(keys, values, form, turn)
    expected = dequantise_reference(packed, torch.float32, turn)
    there = Quantised(form, *(x.to(device) for x in packed.tensors))
    found = dequantise_triton(there, torch.float32, on(device, turn))
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine.cpu() - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_runs_on_a_gpu_are_equal_bit_for_bit(form: Form, generator: torch.Generator) -> None:
    keys, values, turn = made((3001, 128, 128, 64, 0, False), torch.bfloat16, generator)
    there, keys, values = on("cuda", turn), keys.cuda(), values.cuda()
    packed = quantise_triton(keys, values, form, there)
    unpacked = dequantise_triton(packed, torch.bfloat16, there)
    for _ in range(100):
        again = quantise_triton(keys, values, form, there)
        assert all(_same_bits(a, b) for a, b in zip(packed.tensors, again.tensors, strict=True))
        rows = dequantise_triton(packed, torch.bfloat16, there)
        assert all(_same_bits(a, b) for a, b in zip(unpacked, rows, strict=True))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_eight_bit_float_is_read(generator: torch.Generator) -> None:
    """All bit patterns but the two that are no numbers."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8).repeat(1, 1, 1)
    numbers = bits.view(torch.float8_e4m3fn)
    ones = torch.ones(1, 1, 254), torch.ones(1, 1, 1)
    packed = Quantised("fp8", numbers, numbers, *ones)
    keys, values = dequantise_triton(packed, torch.float32, None)
    assert torch.equal(keys, numbers.float())
    assert torch.equal(values, numbers.float())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 2.0**-9])
def test_eight_bit_floats_are_the_nearest(scale: float, generator: torch.Generator) -> None:
    """Also below the smallest normal one: with a largest magnitude of 448 nothing is scaled."""
    values = torch.randn(1, 8, 64, generator=generator) * scale
    values[..., 0] = 448
    found = quantise_triton(values, values, "fp8", None)
    assert torch.equal(found.values.view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: what is tested for
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rows_beyond_half_precision_are_refused(form: Form) -> None:
    rows = torch.full((1, 32, 16), 1e6)
    for way in (quantise_triton, quantise_reference, quantise):
        with pytest.raises(OutOfRange, match=f"{form} cannot hold rows of up to 1e\\+06"):
            way(rows, rows, form, None)
