"""Codecs: what is written is what was described, and what is read again is as near as the format allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation, rotate
from kvrag.segments import LayerKV
from kvrag.store.codec import CODECS, Codec, codec_named

LOSSY = [codec for codec in CODECS.values() if codec.name != "raw"]
ROTATION = Rotation(tuple(100_000 ** -(i / 8) for i in range(8)))


def layer(
    num_tokens: int = 70, *, size: int = 16, value_size: int = 24, dtype: torch.dtype = torch.float32
) -> LayerKV:
    """Keys as models have them: a channel far from zero for all tokens, then rotated."""
    generator = torch.Generator().manual_seed(num_tokens)
    keys = torch.randn(2, num_tokens, size, generator=generator)
    keys[..., 0] += 30
    turn = Rotation(tuple(100_000 ** -(i / (size // 2)) for i in range(size // 2))).turn(
        torch.arange(num_tokens)
    )
    values = torch.randn(2, num_tokens, value_size, generator=generator)
    return LayerKV(rotate(keys[None], turn)[0].to(dtype), values.to(dtype))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Error as a share of the rows' own size, root of mean squares."""
    return float(
        (found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
    )


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(num_tokens=st.integers(1, 100))
@settings(max_examples=15, deadline=None)
def test_what_is_written_is_what_was_described(codec: Codec, dtype: torch.dtype, num_tokens: int) -> None:
    rows = layer(num_tokens, dtype=dtype)
    packed = codec.pack(rows, ROTATION)
    parts = codec.parts((2, 16, 24), num_tokens, dtype)
    assert [(tuple(t.shape), t.dtype, t.nbytes) for t in packed] == [
        (p.shape, p.dtype, p.num_bytes) for p in parts
    ]
    found = codec.unpack(packed, dtype, ROTATION)
    for mine, theirs in ((found.keys, rows.keys), (found.values, rows.values)):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.isfinite(mine).all()


@pytest.mark.parametrize(("name", "limit"), [("raw", 0.0), ("int8", 6e-3), ("fp8", 4e-2), ("int4", 0.1)])
@pytest.mark.parametrize("num_tokens", [5, 32, 200])
def test_rows_come_back_as_near_as_the_format_allows(name: str, limit: float, num_tokens: int) -> None:
    rows = layer(num_tokens)
    codec = codec_named(name)
    found = codec.unpack(codec.pack(rows, ROTATION), torch.float32, ROTATION)
    assert relative(found.keys, rows.keys) <= limit
    assert relative(found.values, rows.values) <= limit


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_err_by_half_a_step(bits: int) -> None:
    rows = layer(64)
    codec = codec_named(f"int{bits}")
    *_, value_zero, value_scale, _, _ = packed = codec.pack(rows, None)
    found = codec.unpack(packed, torch.float32, None)
    step = value_scale.float().repeat_interleave(24 // value_scale.shape[-1], -1)
    assert ((found.values - rows.values).abs() <= 0.51 * step + 1e-3 * value_zero.float().abs().max()).all()


def test_keys_are_quantised_before_their_rotation() -> None:
    """Rotated, an outlier channel swings within a group of tokens, and the steps get as large."""
    rows, codec = layer(128), codec_named("int4")
    aware = codec.unpack(codec.pack(rows, ROTATION), torch.float32, ROTATION)
    blind = codec.unpack(codec.pack(rows, None), torch.float32, None)
    assert relative(aware.keys, rows.keys) < 0.2 * relative(blind.keys, rows.keys)


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
def test_constant_rows_come_back(codec: Codec) -> None:
    rows = LayerKV(torch.zeros(1, 40, 8), torch.full((1, 40, 8), -2.5))
    found = codec.unpack(codec.pack(rows, None), torch.float32, None)
    assert torch.equal(found.keys, rows.keys)
    assert torch.allclose(found.values, rows.values)


@pytest.mark.parametrize(("name", "most"), [("fp8", 0.54), ("int8", 0.64), ("int4", 0.39)])
def test_fewer_bytes_than_bfloat16(name: str, most: float) -> None:
    rows = layer(512, size=64, value_size=64, dtype=torch.bfloat16)
    assert sum(t.nbytes for t in codec_named(name).pack(rows, None)) <= most * rows.num_bytes


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_beyond_float16_are_refused_and_not_written_as_infinity(name: str) -> None:
    rows = LayerKV(torch.zeros(1, 32, 8), torch.full((1, 32, 8), 1e6))
    with pytest.raises(ConfigError, match=r"up to 1e\+06; take fp8 or raw"):
        codec_named(name).pack(rows, None)
    found = codec_named("fp8").unpack(codec_named("fp8").pack(rows, None), torch.float32, None)
    assert relative(found.values, rows.values) < 1e-6


def test_odd_heads_do_not_fit_into_pairs() -> None:
    with pytest.raises(ConfigError, match="pairs of channels"):
        codec_named("int4").parts((1, 15, 16), 4, torch.float32)
    with pytest.raises(ConfigError, match="no codec 'zip'; there are raw, fp8, int8, int4"):
        codec_named("zip")
