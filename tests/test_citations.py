"""What attention adds up to."""

from __future__ import annotations

import pytest
import torch

from kvrag.citations import Attention
from kvrag.focus.risk import risk


def test_means_over_rows_and_shares_over_documents() -> None:
    attention = Attention()
    mass = torch.tensor([[0.1, 0.2, 0.4], [0.1, 0.4, 0.2]])
    attention.add((None, 4, 7), mass, mass.square(), {})
    attention.add((None, 7), mass[:, :2], mass[:, :2].square(), {})  # document 4 was dropped meanwhile
    assert attention.mass(4) == pytest.approx(0.3 / 2)
    assert attention.mass(7) == pytest.approx((0.3 + 0.3) / 2)
    assert attention.mass(99) == 0
    assert attention.focus(4) + attention.focus(7) == pytest.approx(1)
    assert attention.focus(7) == pytest.approx(2 / 3)
    assert attention.span(4) is None


def test_the_span_is_where_most_attention_went_but_for_the_sink() -> None:
    attention = Attention()
    columns = torch.zeros(40)
    columns[0], columns[20:23] = 5.0, 0.2
    both = [torch.zeros(3), columns]
    for _ in range(2):
        attention.add((None, 0), torch.ones(2, 2), torch.ones(2, 2), {0: both, 1: both})
    found = attention.span(0)
    assert found is not None
    start, end, mass = found
    assert 0 < start <= 20
    assert 23 <= end <= 40
    assert mass == pytest.approx(0.6)


def test_a_document_shorter_than_a_span() -> None:
    attention = Attention()
    attention.add((0, 1), torch.ones(1, 2), torch.ones(1, 2), {0: [torch.ones(3), torch.ones(1)]})
    assert attention.span(0) == (1, 3, pytest.approx(2.0))
    assert attention.span(1) is None


def test_risk_signals() -> None:
    sure, open_ = torch.tensor([50.0, 0.0]), torch.tensor([0.0, 0.0])
    assert risk([0.5, 0.5], open_).entropy == pytest.approx(1)
    assert risk([0.5, 0.5], open_).doubt == pytest.approx(0.5)
    one = risk([1.0, 0.0, 0.0], sure)
    assert (one.entropy, one.others) == (0, 0)
    assert one.doubt == pytest.approx(0, abs=1e-6)
    assert risk([3.0, 1.0], sure).others == pytest.approx(0.25)
    for nothing in ([], [0.7], [0.0, 0.0]):
        assert risk(nothing, sure).entropy == 0
