"""One run with borders gives what the segments that it was copied from give."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag_kernels import Parts, RowMask, Rows, Turn, parted_attention, segment_attention_reference


def _segments(lengths: tuple[int, ...], *, kv_heads: int = 2, dim: int = 8, value_dim: int = 6) -> list[Rows]:
    return [
        Rows(
            torch.randn(1, kv_heads, n, dim),
            torch.randn(1, kv_heads, n, value_dim),
        )
        for n in lengths
    ]


def _joined(segments: list[Rows], mask: RowMask | None = None) -> Rows:
    return Rows(
        torch.cat([s.keys for s in segments], 2), torch.cat([s.values for s in segments], 2), mask=mask
    )


def _parts(*ends: int) -> Parts:
    return Parts(ends, device=torch.device("cpu"))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 5))
def test_sums_of_parts_are_what_defines_them(lengths: list[int], behind: int) -> None:
    x = torch.rand(2, 3, sum(lengths) + behind)
    parts = _parts(*accumulate(lengths))
    found = parts.sums(x)
    assert found.shape == (2, 3, len(lengths)) == (2, 3, len(parts))
    torch.testing.assert_close(found, parts.sums_reference(x), rtol=1e-5, atol=1e-6)
    for i, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        torch.testing.assert_close(found[..., i], x[..., end - length : end].sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [(5, 7, 3), (1,), (4, 0, 6), (0, 9)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_equals_the_segments(lengths: tuple[int, ...], num_rows: int, extra: str) -> None:
    segments = [*_segments(lengths), *_segments((4,))]  # the last one stands for fresh rows, without a border
    query = torch.randn(1, 6, num_rows, 8)
    angles = torch.rand(1, num_rows, 4) * 6
    options = {
        "plain": {},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": torch.linspace(-1, 1, 6)},
    }[extra]
    turn = Turn(angles.cos(), angles.sin())
    everywhere = Turn(turn.cos.expand(len(segments), -1, -1), turn.sin.expand(len(segments), -1, -1))
    expected = segment_attention_reference(query, segments, everywhere, scale=0.3, **options)
    parts = _parts(*accumulate(lengths))
    found = parted_attention(query, _joined(segments), turn, parts, scale=0.3, **options)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mass, expected.mass[:-1], rtol=1e-5, atol=1e-6)


def test_a_mask_hides_rows_of_every_part() -> None:
    segments = _segments((4, 5))
    query = torch.randn(1, 4, 1, 8)
    allowed = torch.tensor([[False, False, True, True, False, True, True, True, True]])
    hidden = [
        Rows(s.keys, s.values, mask=RowMask(m))
        for s, m in zip(segments, allowed.split((4, 5), dim=1), strict=True)
    ]
    expected = segment_attention_reference(query, hidden, None, scale=0.5)
    rows = _joined(segments, RowMask(allowed))
    found = parted_attention(query, rows, None, _parts(4, 9), scale=0.5)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mass.sum(0), torch.ones(1, 4, 1), rtol=1e-5, atol=1e-6)


def test_half_precision_stays_half() -> None:
    segments = [Rows(s.keys.bfloat16(), s.values.bfloat16()) for s in _segments((6, 2))]
    query = torch.randn(1, 2, 1, 8).bfloat16()
    found = parted_attention(query, _joined(segments), None, _parts(6), scale=0.5)
    assert found.out.dtype is torch.bfloat16
    assert found.mass.dtype is torch.float32
