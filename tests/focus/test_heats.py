"""Heats: who stands in which group, and how many go on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.focus.heats import Heats, balanced

WIDTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(WIDTHS, st.integers(1, 80))
def test_groups_hold_every_entrant_once_and_fit(widths: list[int], room: int) -> None:
    def span(places: Sequence[int]) -> int:
        return sum(widths[i] for i in places)

    groups = balanced(len(widths), span, room)
    assert [i for group in groups for i in group] == list(range(len(widths)))
    assert all(span(group) <= room or len(group) == 1 for group in groups)


@given(st.integers(1, 60), st.integers(1, 20))
def test_groups_of_equal_entrants_are_as_few_and_as_equal_as_can_be(num: int, room: int) -> None:
    groups = balanced(num, len, room)
    assert len(groups) == -(-num // room)
    assert max(map(len, groups)) == -(-num // len(groups))


@given(
    st.integers(2, 50),
    st.integers(1, 50),
    st.floats(0.01, 0.99),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_somebody_goes_on_and_somebody_goes(
    entrants: int, keep: int, share: float, winners: int | None
) -> None:
    going_on = Heats(winners=winners).num_winners(entrants, keep, share)
    assert 1 <= going_on < entrants
    assert going_on <= (keep if winners is None else winners)


def test_a_heat_sends_on_all_who_may_be_kept() -> None:
    assert Heats().num_winners(20, keep=10, share=0.1) == 10
    assert Heats(winners=3).num_winners(20, keep=10, share=0.1) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": 0.0}, "size"), ({"fill": 1.5}, "fill"), ({"winners": 0}, "winners"), ({"depth": 0}, "depth")],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Heats(**settings)  # type: ignore[arg-type]
