"""Weighted column sums against their definition: all probabilities of one softmax."""

from __future__ import annotations

import pytest
import torch

from kvrag_kernels import (
    RowMask,
    Rows,
    Turn,
    column_scores,
    column_scores_reference,
    segment_attention,
    segment_attention_reference,
)
from kvrag_kernels.segment_attention import columns


def rows(num: int, heads: int = 2, dim: int = 8, **options: object) -> Rows:
    return Rows(torch.randn(1, heads, num, dim), torch.randn(1, heads, num, dim), **options)  # type: ignore[arg-type]


def turn(num_segments: int, num_rows: int) -> Turn:
    angles = torch.randn(num_segments, num_rows, 4)
    return Turn(angles.cos(), angles.sin())


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_sums_are_those_of_the_definition(
    heads: int, num_rows: int, softcap: float | None, with_sinks: bool
) -> None:
    query, own = torch.randn(1, heads, num_rows, 8), rows(num_rows, causal=num_rows > 1)
    allowed = torch.rand(num_rows, 9) < 0.6
    segments = [rows(5), rows(0), rows(9, mask=RowMask(allowed)), own]
    turned, weights = turn(4, num_rows), torch.rand(num_rows)
    sinks = torch.randn(heads) if with_sinks else None
    options = {"scale": 0.4, "softcap": softcap}
    mass = segment_attention(query, segments, turned, sinks=sinks, **options).mass  # type: ignore[arg-type]
    expected = column_scores_reference(query, segments, turned, weights, sinks=sinks, **options)  # type: ignore[arg-type]
    for i, segment in enumerate(segments):
        part = Turn(turned.cos[i : i + 1], turned.sin[i : i + 1])
        found = column_scores(query, segment, part, mass[i], weights, **options)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[i], atol=1e-6, rtol=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, segment = torch.randn(1, 4, 50, 8), rows(50, causal=True)
    mass, weights = torch.rand(1, 4, 50), torch.rand(50)
    whole = column_scores(query, segment, None, mass, weights, scale=0.3)
    monkeypatch.setattr(columns, "_CELLS", 4 * 50 * 7)
    torch.testing.assert_close(column_scores(query, segment, None, mass, weights, scale=0.3), whole)


def test_without_positions_and_in_sixteen_bits() -> None:
    query, segment = torch.randn(1, 4, 6, 8).bfloat16(), rows(20)
    segment = Rows(segment.keys.bfloat16(), segment.values.bfloat16())
    mass = segment_attention_reference(query, [segment], None, scale=0.3).mass
    weights = torch.rand(6)
    found = column_scores(query, segment, None, mass[0], weights, scale=0.3)
    (expected,) = column_scores_reference(query, [segment], None, weights, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.sum(-1), weights.sum().expand(4))


def test_weights_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="6 query rows have weights"):
        column_scores(torch.randn(1, 4, 6, 8), rows(3), None, torch.rand(1, 4, 6), torch.rand(5), scale=1)
