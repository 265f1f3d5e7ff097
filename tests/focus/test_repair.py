"""Which rows are read again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.compose import Arrangement, Unit
from kvrag.errors import ConfigError
from kvrag.focus.repair import Deviation, Evidence, FirstRows, QueryDriven, Repair
from kvrag.segments import KV


def arrangement(lengths: list[int]) -> Arrangement:
    units = tuple(Unit(i, KV(tuple(range(n)), ()), 0) for i, n in enumerate(lengths))
    return Arrangement(None, (), units, (1,), 0)


def never(layer: int) -> dict[int, torch.Tensor]:
    raise AssertionError("nothing was to be read")


def test_first_rows_of_all_but_the_first_document() -> None:
    rows = FirstRows(3).rows(arrangement([5, 2, 9]), Evidence(never))
    assert rows == {1: (0, 1), 2: (0, 1, 2)}


def test_the_rows_that_deviate_most() -> None:
    changes = {0: torch.tensor([0.0, 0.1]), 1: torch.tensor([3.0, 0.2, 5.0]), 2: torch.tensor([4.0])}
    asked = []

    def deviations(layer: int) -> dict[int, torch.Tensor]:
        asked.append(layer)
        return changes

    rows = Deviation(0.5, layer=2).rows(arrangement([2, 3, 1]), Evidence(deviations))
    assert rows == {0: (), 1: (0, 2), 2: (0,)}
    assert asked == [2]


def test_everything_is_chosen_without_looking() -> None:
    assert Deviation(1.0).rows(arrangement([2, 1]), Evidence(never)) == {0: (0, 1), 1: (0,)}


def test_the_rows_the_question_looks_at_summed_over_layers() -> None:
    columns = {
        1: {0: torch.tensor([0.5, 0.0]), 1: torch.tensor([0.0, 0.1]), 7: torch.tensor([9.0])},
        3: {0: torch.tensor([0.0, 0.4]), 1: torch.tensor([0.0, 0.5]), 7: torch.tensor([9.0])},
    }
    repair = QueryDriven(0.5, layers=(1, 3))
    assert repair.needs_question
    assert repair.column_layers(4) == {1, 3}
    assert QueryDriven().column_layers(4) == {3}
    rows = repair.rows(arrangement([2, 2]), Evidence(never, columns))  # document 7 was dropped
    assert rows == {0: (0,), 1: (1,)}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.floats(0, 1))
def test_as_many_rows_as_the_share_says(lengths: list[int], share: float) -> None:
    torch.manual_seed(0)
    changes = {i: torch.rand(n) for i, n in enumerate(lengths)}
    rows = Deviation(share).rows(arrangement(lengths), Evidence(lambda layer: changes))
    assert sum(len(r) for r in rows.values()) == round(share * sum(lengths))
    assert all(list(r) == sorted(set(r)) and all(0 <= i < lengths[n] for i in r) for n, r in rows.items())


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (FirstRows, {"count": -1}),
        (Deviation, {"share": 1.1}),
        (Deviation, {"layer": 0}),
        (QueryDriven, {"share": -0.1}),
        (QueryDriven, {"looked_by": "all"}),
    ],
)
def test_impossible_settings_are_refused(kind: type[Repair], wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
