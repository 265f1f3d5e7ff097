"""Positions of documents: the paper's examples, shared places by hand, and what holds for any documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvrag.errors import ConfigError, ContextOverflow
from kvrag.focus.beyond import interpolate, round_robin, share
from kvrag.focus.placement import Beyond, Layout, Order, Placed, Placement

LAYOUTS: tuple[Layout, ...] = ("contiguous", "slots", "overlap", "native")
ORDERS: tuple[Order, ...] = ("keep", "align", "sort")
WITHIN: tuple[Beyond, ...] = ("share", "round_robin", "interpolate", "truncate")
BEYOND: tuple[Beyond, ...] = (*WITHIN, "extrapolate")


def after(
    placement: Placement,
    lengths: Sequence[int],
    survivors: Sequence[int],
    *,
    start: int = 0,
    capacity: int = 1000,
    scores: Sequence[float] = (),
) -> Placed:
    """The positions behind one pruning."""
    first = placement.first(lengths, start=start, capacity=capacity)
    return placement.after(
        first,
        lengths,
        start=start,
        capacity=capacity,
        survivors=survivors,
        scores=scores or [0.0] * len(lengths),
    )


class TestPaper:
    """Section 4 of the specification: 4 slots, document 2 is pruned, document 4 scores lowest."""

    SCORES = (0.3, 0.1, 0.4, 0.2)

    @pytest.mark.parametrize("layout", ["slots", "contiguous"])  # the same for documents of one length
    @pytest.mark.parametrize(
        ("order", "slots"),
        [("keep", {1: 1, 3: 3, 4: 4}), ("align", {1: 2, 3: 3, 4: 4}), ("sort", {4: 2, 1: 3, 3: 4})],
    )
    def test_allocation(self, layout: Layout, order: Order, slots: dict[int, int]) -> None:
        placed = after(Placement(layout, order), [10] * 4, [0, 2, 3], start=7, scores=self.SCORES)

        assert {document: placed.starts[document - 1] for document in slots} == {
            document: 7 + 10 * (slot - 1) for document, slot in slots.items()
        }
        assert placed.query == 7 + 4 * 10

    def test_the_pruned_document_stays_for_the_layers_below(self) -> None:
        assert after(Placement("slots", "align"), [10] * 4, [0, 2, 3], start=7).starts[1] == 17

    def test_two_prunings(self) -> None:
        placement = Placement("slots", "sort")
        lengths = [10] * 4
        once = after(placement, lengths, [0, 2, 3], scores=self.SCORES)
        twice = placement.after(
            once, lengths, start=0, capacity=1000, survivors=[0, 2], scores=(0.9, 0.1, 0.8, 0.2)
        )

        assert twice == Placed(
            (30, 10, 20, 10), 40
        )  # document 1 has overtaken; 2 and 4 stand where they were


class TestFirst:
    @pytest.mark.parametrize(
        ("layout", "starts", "query"),
        [
            ("contiguous", (5, 8, 15), 17),
            ("slots", (5, 12, 19), 26),
            ("overlap", (5, 5, 5), 12),
            ("native", (5, 5, 5), 17),
        ],
    )
    def test_layouts(self, layout: Layout, starts: tuple[int, ...], query: int) -> None:
        assert Placement(layout).first([3, 7, 2], start=5, capacity=21) == Placed(starts, query)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("beyond", BEYOND)
    @pytest.mark.parametrize("capacity", [-3, 0, 9])
    def test_no_documents(self, layout: Layout, beyond: Beyond, capacity: int) -> None:
        placement = Placement(layout, "align", beyond)
        nothing = placement.first([], start=4, capacity=capacity)

        assert nothing == Placed((), 4)
        assert placement.after(nothing, [], start=4, capacity=capacity, survivors=[], scores=[]) == nothing


class TestAfter:
    def test_contiguous_align_ends_at_the_query(self) -> None:
        placed = after(Placement(order="align"), [3, 7, 2, 4], [0, 2], start=5)

        assert placed == Placed((16, 8, 19, 17), 21)  # 16 + 3 = 19, 19 + 2 = 21

    def test_contiguous_sort_puts_the_best_next_to_the_query(self) -> None:
        placed = after(Placement(order="sort"), [3, 7, 2, 4], [0, 1, 2], start=5, scores=[0.5, 0.9, 0.7, 0.1])

        assert placed == Placed((9, 14, 12, 17), 21)

    def test_equal_scores_stay_in_retrieval_order(self) -> None:
        lengths, survivors, scores = [3, 7, 2, 4], [0, 2, 3], [0.5, 0.9, 0.5, 0.5]

        assert after(Placement(order="sort"), lengths, survivors, scores=scores) == after(
            Placement(order="align"), lengths, survivors
        )

    def test_slots_keep_the_width_of_a_pruned_document(self) -> None:
        assert after(Placement("slots", "align"), [3, 7, 2], [0, 2]).starts == (7, 7, 14)

    @pytest.mark.parametrize("layout", ["overlap", "native"])
    @pytest.mark.parametrize("order", ORDERS)
    def test_order_is_nothing_to_documents_that_stand_together(self, layout: Layout, order: Order) -> None:
        placed = after(Placement(layout, order), [3, 7, 2], [2], start=5, scores=[3, 2, 1])

        assert placed.starts == (5, 5, 5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", ORDERS)
    def test_nobody_survives(self, layout: Layout, order: Order) -> None:
        placement = Placement(layout, order)

        assert after(placement, [3, 7], []) == placement.first([3, 7], start=0, capacity=1000)


class TestBeyond:
    @pytest.mark.parametrize(
        ("count", "places", "expected"),
        [
            (5, 2, (1, 1, 1, 2, 2)),  # 1 + floor(0, .4, .8, 1.2, 1.6)
            (4, 3, (1, 1, 2, 3)),  # 1 + floor(0, .75, 1.5, 2.25)
            (7, 3, (1, 1, 1, 2, 2, 3, 3)),  # 1 + floor(0, 3/7, 6/7, 9/7, 12/7, 15/7, 18/7)
            (3, 1, (1, 1, 1)),
        ],
    )
    def test_shared_slots(self, count: int, places: int, expected: tuple[int, ...]) -> None:
        capacity = 10 * places + 9  # the rest of a slot is none
        placed = Placement("slots").first([10] * count, start=6, capacity=capacity)

        assert placed == Placed(tuple(6 + 10 * (slot - 1) for slot in expected), 6 + capacity)

    def test_shared_places_of_varied_width(self) -> None:
        # Four ranks in three places: {4, 6}, {3}, {5} is 14 wide; in two: {4, 6}, {3, 5} is 11.
        assert share([4, 6, 3, 5], 14) == (0, 0, 6, 9)
        assert share([4, 6, 3, 5], 13) == (0, 0, 6, 6)
        assert share([4, 6, 3, 5], 10) == (0, 0, 0, 0)

    def test_more_places_can_be_narrower(self) -> None:
        # Two places, {1, 1, 9}, {9, 1}, are 18 wide, three, {1, 1}, {9, 9}, {1}, only 11.
        assert share([1, 1, 9, 9, 1], 11) == (0, 0, 1, 1, 10)

    def test_dealt_out_in_turn(self) -> None:
        assert round_robin([10] * 5, 29) == (0, 10, 0, 10, 0)
        assert round_robin([4, 6, 3, 5], 15) == (0, 5, 11, 0)  # {4, 5}, {6}, {3}

    def test_interpolated(self) -> None:
        assert interpolate([10, 10, 10], 25) == (0, 8, 15)  # 7.5 rounded up
        assert interpolate([4, 4, 4, 4], 10) == (0, 2, 4, 6)

    def test_interpolated_documents_of_any_length_stay_inside(self) -> None:
        # Scaled by 99/160 these are 0, 6, 37 and 99; the third ends inside only if it begins at 0.
        assert interpolate([10, 50, 100, 1], 100) == (0, 0, 0, 99)

    @pytest.mark.parametrize("layout", ["contiguous", "slots"])
    def test_extrapolated(self, layout: Layout) -> None:
        assert Placement(layout, beyond="extrapolate").first([10, 10], start=3, capacity=5) == Placed(
            (3, 13), 23
        )

    @pytest.mark.parametrize(
        ("layout", "starts", "query"),
        [
            ("contiguous", (3, 7, None, None), 9),
            ("slots", (3, 7, None, None), 11),
            ("native", (3, 3, None, None), 9),
            ("overlap", (3, 3, 3, 3), 11),
        ],
    )
    def test_truncated(self, layout: Layout, starts: tuple[int | None, ...], query: int) -> None:
        # Slots are as wide as the longest of those that stay: four, not eight.
        placed = Placement(layout, beyond="truncate").first([4, 2, 8, 1], start=3, capacity=9)

        assert placed == Placed(starts, query)

    def test_truncated_documents_never_come_back(self) -> None:
        placement = Placement("slots", "sort", "truncate")
        placed = after(placement, [4, 2, 8, 1], [0, 2, 3], start=3, capacity=9, scores=[1, 2, 3, 4])

        assert placed == Placed((7, 7, None, None), 11)

    @pytest.mark.parametrize(
        ("beyond", "query"),
        [("share", 15), ("round_robin", 15), ("interpolate", 15), ("extrapolate", 19), ("truncate", 11)],
    )
    def test_native_moves_only_the_query(self, beyond: Beyond, query: int) -> None:
        assert Placement("native", beyond=beyond).first([8, 8], start=3, capacity=12).query == query

    def test_survivors_share_until_they_fit(self) -> None:
        placement, lengths = Placement("slots", "sort"), [10] * 5
        arguments: dict[str, Any] = {"start": 0, "capacity": 25, "scores": [5, 4, 3, 2, 1]}
        first = placement.first(lengths, start=0, capacity=25)
        three = placement.after(first, lengths, survivors=[0, 1, 2], **arguments)
        one = placement.after(three, lengths, survivors=[0], **arguments)

        assert first == Placed((0, 0, 0, 10, 10), 25)
        assert three == Placed((10, 0, 0, 10, 10), 25)  # ascending: 3, 2 and 1 in slots 1, 1, 2
        assert one == Placed((10, 0, 0, 10, 10), 25)  # the last of two slots
        two = placement.after(three, lengths, survivors=[0, 1], **arguments)
        assert two == Placed((10, 0, 0, 10, 10), 25)

    def test_contiguous_survivors_that_fit_end_at_the_query(self) -> None:
        placement = Placement("contiguous", "align")

        assert after(placement, [10] * 5, [1, 4], capacity=25).starts == (0, 5, 0, 10, 15)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("beyond", WITHIN)
    def test_one_document_longer_than_the_range(self, layout: Layout, beyond: Beyond) -> None:
        with pytest.raises(ContextOverflow, match=r"12 rows .* 11 positions"):
            Placement(layout, beyond=beyond).first([3, 12], start=0, capacity=11)

        assert Placement(layout, beyond="extrapolate").first([3, 12], start=0, capacity=11).query >= 12


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "value", "expected"),
        [
            ("layout", "stacked", "contiguous, slots, overlap, native"),
            ("order", "reverse", "keep, align, sort"),
            ("beyond", "wrap", "share, round_robin, interpolate, extrapolate, truncate"),
            ("window", 0, "at least 1"),
        ],
    )
    def test_unknown_values_are_named(self, setting: str, value: Any, expected: str) -> None:
        with pytest.raises(ConfigError, match=f"{setting} is {value!r}; expected .*{expected}"):
            Placement(**{setting: value})

    def test_defaults(self) -> None:
        assert Placement(window=1) == Placement("contiguous", "keep", "share", 1)


@dataclass(frozen=True)
class Course:
    """One prompt's positions, from the first to those behind every pruning, and who was still read."""

    placement: Placement
    lengths: list[int]
    start: int
    capacity: int
    steps: list[tuple[Placed, list[int]]]

    def width(self, document: int) -> int:
        """Positions that a document takes."""
        there = [
            n for n, begin in zip(self.lengths, self.steps[0][0].starts, strict=True) if begin is not None
        ]
        return max(there) if self.placement.layout == "slots" else self.lengths[document]

    def fits(self, documents: Sequence[int]) -> bool:
        """Whether documents can stand side by side within the range."""
        return sum(map(self.width, documents)) <= self.capacity


@st.composite
def courses(
    draw: st.DrawFn,
    *,
    layouts: Sequence[Layout] = LAYOUTS,
    orders: Sequence[Order] = ORDERS,
    beyond: Sequence[Beyond] = BEYOND,
) -> Course:
    """Any documents in a range that holds the longest of them, pruned one or more at a time."""
    placement = Placement(
        draw(st.sampled_from(layouts)), draw(st.sampled_from(orders)), draw(st.sampled_from(beyond))
    )
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    capacity = draw(st.integers(max(lengths), max(lengths) * len(lengths) + 3))
    start = draw(st.integers(0, 20))
    placed = placement.first(lengths, start=start, capacity=capacity)
    survivors = list(range(len(lengths)))
    steps = [(placed, [i for i in survivors if placed.starts[i] is not None])]
    for _ in range(draw(st.integers(0, 3))):
        survivors = [i for i in survivors if draw(st.booleans())]
        scores = [float(draw(st.integers(0, 3))) for _ in lengths]
        placed = placement.after(
            placed, lengths, start=start, capacity=capacity, survivors=survivors, scores=scores
        )
        steps.append((placed, [i for i in survivors if placed.starts[i] is not None]))
    return Course(placement, lengths, start, capacity, steps)


def at(placed: Placed, document: int) -> int:
    """Where a document that was not left out begins."""
    begin = placed.starts[document]
    assert begin is not None
    return begin


class TestAlways:
    @given(courses(beyond=WITHIN))
    def test_every_row_is_inside_the_range_and_before_the_query(self, course: Course) -> None:
        for placed, _ in course.steps:
            assert placed.query <= course.start + course.capacity
            for begin, length in zip(placed.starts, course.lengths, strict=True):
                assert begin is None or course.start <= begin <= placed.query - length

    @given(courses())
    def test_the_query_never_moves_and_nobody_goes_or_comes(self, course: Course) -> None:
        first, _ = course.steps[0]
        for placed, _ in course.steps:
            assert placed.query == first.query
            assert [s is None for s in placed.starts] == [s is None for s in first.starts]

    @given(courses(orders=["keep"]))
    def test_keep_moves_nobody(self, course: Course) -> None:
        assert {placed for placed, _ in course.steps} == {course.steps[0][0]}

    @given(courses())
    def test_the_pruned_stay(self, course: Course) -> None:
        for (before, _), (now, survivors) in pairwise(course.steps):
            for i in set(range(len(course.lengths))) - set(survivors):
                assert now.starts[i] == before.starts[i]

    @given(courses(layouts=["contiguous", "slots"]))
    def test_documents_share_no_position_where_they_need_not(self, course: Course) -> None:
        for number, (placed, survivors) in enumerate(course.steps):
            moved = number == 0 or course.placement.order != "keep"
            everybody = course.steps[0][1]
            if course.placement.beyond == "extrapolate" or course.fits(survivors if moved else everybody):
                for i, j in combinations(survivors, 2):
                    a, b = sorted((i, j), key=lambda k: at(placed, k))
                    assert at(placed, a) + course.lengths[a] <= at(placed, b)

    @given(courses(layouts=["contiguous", "slots"], beyond=["share", "round_robin"]))
    def test_documents_that_share_share_a_beginning(self, course: Course) -> None:
        for placed, survivors in course.steps:
            for i, j in combinations(survivors, 2):
                a, b = sorted((i, j), key=lambda k: at(placed, k))
                assert at(placed, a) == at(placed, b) or at(placed, a) + course.lengths[a] <= at(placed, b)

    @given(courses(orders=["align"], beyond=["share", "interpolate", "extrapolate", "truncate"]))
    def test_align_keeps_the_order(self, course: Course) -> None:
        for placed, survivors in course.steps:
            begins = [at(placed, i) for i in survivors]
            assert begins == sorted(begins)

    @given(courses(layouts=["contiguous"], orders=["align", "sort"]))
    def test_packed_survivors_end_at_the_query(self, course: Course) -> None:
        for placed, survivors in course.steps[1:]:
            if survivors and (course.placement.beyond == "extrapolate" or course.fits(survivors)):
                ends = {at(placed, i) + course.lengths[i] for i in survivors}
                assert max(ends) == placed.query
                assert min(at(placed, i) for i in survivors) == placed.query - sum(
                    course.lengths[i] for i in survivors
                )

    @given(courses(layouts=["contiguous"], beyond=["share", "round_robin", "interpolate", "extrapolate"]))
    def test_contiguous_documents_that_fit_stand_one_behind_the_other(self, course: Course) -> None:
        assume(sum(course.lengths) <= course.capacity)

        *starts, query = accumulate(course.lengths, initial=course.start)
        assert course.steps[0][0] == Placed(tuple(starts), query)

    @given(courses(layouts=["contiguous", "slots"], orders=["keep"], beyond=["truncate"]))
    def test_truncation_leaves_out_the_last_and_no_more_than_it_must(self, course: Course) -> None:
        starts = course.steps[0][0].starts
        kept = [i for i, begin in enumerate(starts) if begin is not None]

        assert kept == list(range(len(kept)))
        if len(kept) < len(starts):
            more = course.lengths[: len(kept) + 1]
            wanted = max(more) * len(more) if course.placement.layout == "slots" else sum(more)
            assert wanted > course.capacity
