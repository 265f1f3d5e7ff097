"""A context group is read as its definition says, and is not there when it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvrag_kernels import Attended, RowMask, Rows, segment_attention, segment_attention_reference
from kvrag_kernels.segment_attention import Group, segment_attention_cpu, segment_attention_single

PATHS: dict[str, Callable[..., Attended]] = {
    "dispatched": segment_attention,
    "reference": segment_attention_reference,
    "cpu": segment_attention_cpu,
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def _query(num_rows: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, num_rows, 8, generator=torch.Generator().manual_seed(1))


def _segments(*grouped: bool) -> list[Rows]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 2, 5 + 2 * i, 8) for i in range(len(grouped))]
    return [
        Rows(torch.randn(s, generator=generator), torch.randn(s, generator=generator), in_group=g)
        for s, g in zip(shapes, grouped, strict=True)
    ]


def _same(a: Attended, b: Attended) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.mass, b.mass)


@every_path
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, 4)], ids=["", "sinks"])
def test_one_and_one_is_no_group(path: Callable[..., Attended], sinks: torch.Tensor | None) -> None:
    segments = _segments(False, True, True)
    plain = path(_query(), segments, None, scale=0.4, sinks=sinks)
    assert _same(path(_query(), segments, None, scale=0.4, sinks=sinks, group=Group()), plain)


@every_path
def test_a_group_without_segments_is_no_group(path: Callable[..., Attended]) -> None:
    segments = _segments(False, False)
    plain = path(_query(), segments, None, scale=0.4)
    assert _same(path(_query(), segments, None, scale=0.4, group=Group(0.5, 0.8)), plain)


@every_path
@pytest.mark.parametrize("group", [Group(0.5, 0.8), Group(2.0, 1.5)], ids=str)
def test_the_group_as_a_whole_draws_and_spreads(path: Callable[..., Attended], group: Group) -> None:
    """Against exp(S * T * G), from scores taken segment by segment in float64."""
    query, segments = _query(), _segments(True, False, True)
    keys = [s.keys.double().repeat_interleave(2, 1) for s in segments]
    scores = [0.4 * query.double() @ k.mT for k in keys]
    within = [scores[i] / group.temperature for i in (0, 2)]
    total = torch.cat(within, -1).exp().sum(-1)
    weight = total ** (group.scale * group.temperature)
    share = weight / (weight + scores[1].exp().sum(-1))
    expected = [share * within[0].exp().sum(-1) / total, 1 - share, share * within[1].exp().sum(-1) / total]
    got = path(query, segments, None, scale=0.4, group=group)
    torch.testing.assert_close(got.mass.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@every_path
def test_everything_in_the_group_leaves_the_temperature(path: Callable[..., Attended]) -> None:
    segments = _segments(True, True)
    plain = path(_query(), segments, None, scale=0.8)
    got = path(_query(), segments, None, scale=0.4, group=Group(0.5, 3.0))
    torch.testing.assert_close(got.out, plain.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.mass, plain.mass, rtol=1e-5, atol=1e-6)


@every_path
def test_rows_that_see_no_group_stay_as_they_are(path: Callable[..., Attended]) -> None:
    before, hidden, late = _segments(False, True, True)
    allowed = torch.ones(3, 7, dtype=torch.bool)
    allowed[:2] = False
    segments = [before, replace(hidden, mask=RowMask(allowed)), replace(late, first_row=2)]
    plain = path(_query(), segments, None, scale=0.4)
    got = path(_query(), segments, None, scale=0.4, group=Group(0.5, 0.8))
    assert torch.equal(got.out[:, :, :2], plain.out[:, :, :2])
    assert torch.equal(got.mass[..., :2], plain.mass[..., :2])
    assert not torch.allclose(got.mass[..., 2], plain.mass[..., 2], atol=1e-3)
    assert got.out.isfinite().all()


def test_the_reference_has_gradients_where_rows_see_no_group() -> None:
    before, late = _segments(False, True)
    query = _query().requires_grad_()
    segments = [before, replace(late, first_row=2)]
    segment_attention_reference(query, segments, None, scale=0.4, group=Group(0.5, 0.8)).out.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_single_segment(grouped: bool) -> None:
    segments, group = _segments(grouped), Group(0.5, 0.8)
    got = segment_attention_single(_query(), segments, None, scale=0.4, group=group)
    expected = segment_attention_reference(_query(), segments, None, scale=0.4, group=group)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.mass, expected.mass, rtol=1e-5, atol=1e-6)


def test_the_only_segment_with_other_head_sizes_is_dispatched_with_its_group() -> None:
    """Not the flash operator's case: on a GPU every single segment comes this way."""
    (rows,) = _segments(True)
    segments, group = [replace(rows, values=rows.values[..., :6])], Group(0.5, 0.8)
    got = segment_attention(_query(), segments, None, scale=0.4, group=group)
    expected = segment_attention_reference(_query(), segments, None, scale=0.4, group=group)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)], ids=str)
def test_settings_that_mean_nothing_are_refused(settings: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Group(*settings)
