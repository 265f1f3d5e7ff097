"""Column scores from segment attention's log-sum-exps, against all probabilities of one softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvrag_kernels import (
    Backend,
    Group,
    RowMask,
    Rows,
    Scoring,
    Turn,
    column_scores,
    segment_attention,
    segment_attention_many,
    strided_prefill,
    using,
)
from kvrag_kernels.strided_prefill import strided_prefill_reference

BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "triton")


def rows(num: int, heads: int = 2, dim: int = 8, **options: Any) -> Rows:
    return Rows(torch.randn(1, heads, num, dim), torch.randn(1, heads, num, dim), **options)


def turn(num_segments: int, num_rows: int) -> Turn:
    angles = torch.randn(num_segments, num_rows, 4)
    return Turn(angles.cos(), angles.sin())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_are_those_of_the_definition(
    backend: Backend, num_rows: int, softcap: float | None, with_sinks: bool, masked: bool
) -> None:
    query, own = torch.randn(1, 4, num_rows, 8), rows(num_rows, causal=num_rows > 1)
    mask = RowMask(torch.rand(num_rows, 9) < 0.6) if masked else None
    segments = [rows(5), rows(0), rows(9, mask=mask), own]
    turned, scoring = turn(4, num_rows), Scoring(torch.rand(num_rows))
    options: dict[str, Any] = {"scale": 0.4, "softcap": softcap}
    sinks = torch.randn(4) if with_sinks else None
    expected = strided_prefill_reference(query, segments, turned, sinks=sinks, scoring=scoring, **options)
    with using(backend):
        lse = segment_attention(query, segments, turned, sinks=sinks, with_lse=True, **options).lse
        assert lse is not None
        found = column_scores(query, segments, turned, lse, scoring, **options)
    assert lse.dtype == found.dtype == torch.float32
    torch.testing.assert_close(lse, expected.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_run_alone_has_its_sum(backend: Backend) -> None:
    """The operator that needs no merging gives no log-sum-exp; asked for one, another path is taken."""
    query, own = torch.randn(1, 4, 300, 8), rows(300, causal=True)
    expected = strided_prefill_reference(query, [own], None, scale=0.4).lse
    with using(backend):
        lse = segment_attention(query, [own], None, scale=0.4, with_lse=True).lse
    torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_group_counts_as_it_weighs(with_sinks: bool) -> None:
    query, segments = torch.randn(1, 4, 3, 8), [rows(5), rows(20, in_group=True), rows(9, in_group=True)]
    sinks = torch.randn(4) if with_sinks else None
    scores = torch.einsum("bhtd,bhnd->bhtn", query, segments[0].keys.repeat_interleave(2, dim=1)) * 0.4
    for name in BACKENDS:
        with using(name):
            found = segment_attention(
                query, segments, None, scale=0.4, sinks=sinks, group=Group(0.7, 1.3), with_lse=True
            )
        assert found.lse is not None
        share = (scores.logsumexp(-1) - found.lse).exp()
        torch.testing.assert_close(share, found.mass[0], atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing_sum_to_nothing() -> None:
    query, segments = torch.randn(1, 4, 3, 8), [rows(20, first_row=1), rows(5, first_row=2)]
    for name in ("cpu", "triton"):
        with using(name):
            lse = segment_attention(query, segments, None, scale=0.4, with_lse=True).lse
        assert lse is not None
        assert bool((lse[:, :, 0] == float("-inf")).all())
        assert bool(lse[:, :, 1:].isfinite().all())


def test_several_requests_have_their_own_sums() -> None:
    query = torch.randn(2, 4, 3, 8)
    tables = [[rows(20), rows(7)], [rows(5)]]
    with using("triton"):
        found = segment_attention_many(query, tables, [None, None], scale=0.4)
    for i, segments in enumerate(tables):
        expected = strided_prefill(query[i : i + 1], segments, None, scale=0.4).lse
        torch.testing.assert_close(found[i].lse, expected, atol=1e-5, rtol=1e-5)


def test_weights_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="6 query rows need as many weights"):
        column_scores(
            torch.randn(1, 4, 6, 8), [rows(3)], None, torch.rand(1, 4, 6), Scoring(torch.rand(5)), scale=1
        )
