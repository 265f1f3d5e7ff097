"""The update of a cascade all at once is the one token by token, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag_kernels import cascade_update
from kvrag_kernels.cascade_update import (
    CascadeUpdate,
    cascade_update_reference,
    cascade_update_vectorised,
    first_competing,
    rounds,
)

SCHEDULES = {
    "pow2": lambda i: 2**i,
    "pow3": lambda i: 3**i,
    "iplus1": lambda i: i + 1,
    "1-then-2": lambda i: 1 + (i > 0),
    "all 1": lambda i: 1,
    "sparse": lambda i: 1 + 6 * i,
    "slow": lambda i: 2 if i == 0 else 5,
}


def _same(a: CascadeUpdate, b: CascadeUpdate) -> bool:
    return (
        torch.equal(a.slots, b.slots)
        and torch.equal(a.sources, b.sources)
        and (a.stored, a.start) == (b.stored, b.start)
    )


def _after(update: CascadeUpdate, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What lies in all slots afterwards."""
    found = old.clone()
    found[..., update.slots] = torch.cat([old, new], dim=-1).gather(-1, update.sources)
    return found


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[str, Any], list[torch.Tensor], int]:
    """Settings, the scores of consecutive strides, and the seed of scores that change in between."""
    width, sub_caches = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    options = {
        "width": width,
        "periods": [schedule(i) for i in range(sub_caches)],
        "eager": draw(st.booleans()),
    }
    levels = draw(st.sampled_from([1, 3, 1000]))  # few different scores: many ties
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    longest = 4 * width * sub_caches + 3
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=6))
    return options, [torch.randint(levels, (2, 2, q), generator=generator) / 8 for q in lengths], seed


@given(stream=streams())
@settings(max_examples=150)
def test_all_at_once_equals_token_by_token(stream: tuple[dict[str, Any], list[torch.Tensor], int]) -> None:
    options, strides, seed = stream
    width, sub_caches = options["width"], len(options["periods"])
    generator = torch.Generator().manual_seed(seed + 1)
    scores = torch.zeros(2, 2, width * sub_caches)
    stored = start = (0,) * sub_caches
    arrived = 0
    for fresh in strides:
        given_ = (scores, fresh, stored, start, arrived)
        expected = cascade_update_reference(*given_, **options)
        found = cascade_update_vectorised(*given_, **options)
        assert _same(found, expected)
        assert _same(cascade_update(*given_, **options), expected)
        stored, start, arrived = found.stored, found.start, arrived + fresh.shape[-1]
        scores = _after(found, scores, fresh)
        scores = scores * torch.randint(1, 3, scores.shape, generator=generator)  # as attention changes them


@given(stream=streams())
@settings(max_examples=50)
def test_scores_of_empty_slots_are_not_looked_at(
    stream: tuple[dict[str, Any], list[torch.Tensor], int],
) -> None:
    options, strides, _ = stream
    sub_caches = len(options["periods"])
    shape = (2, 2, options["width"] * sub_caches)
    none = (0,) * sub_caches
    one = cascade_update(torch.zeros(shape), strides[0], none, none, 0, **options)
    assert _same(one, cascade_update(torch.full(shape, torch.nan), strides[0], none, none, 0, **options))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_tournament_leaves_one_of_every_segment(lengths: list[int]) -> None:
    ends = torch.tensor(lengths).cumsum(0)
    firsts, num_items = (ends - torch.tensor(lengths)).numpy(), int(ends[-1])
    matches = rounds(firsts, num_items)
    assert len(matches) == (max(lengths) - 1).bit_length()
    left = list(range(num_items))
    for earlier, later in matches:
        left = [max(left[a], left[b]) for a, b in zip(earlier, later, strict=True)]
    assert left == [int(end) - 1 for end in ends]


@given(stream=streams())
@settings(max_examples=50)
def test_scores_of_settled_entries_change_nothing(
    stream: tuple[dict[str, Any], list[torch.Tensor], int],
) -> None:
    """Whatever they become before any stride, the same entries stay."""
    options, strides, seed = stream
    width, sub_caches = options["width"], len(options["periods"])
    generator = torch.Generator().manual_seed(seed + 1)
    scores = torch.zeros(2, 2, width * sub_caches)
    stored = start = (0,) * sub_caches
    arrived = 0
    for fresh in strides:
        settled = torch.arange(first_competing(stored))  # the oldest lie in the last ring
        slots = width * (sub_caches - 1) + (start[-1] + settled) % width
        other = scores.clone()
        other[..., slots] = torch.rand(2, 2, len(slots), generator=generator) * 2000 - 1000
        found = cascade_update(other, fresh, stored, start, arrived, **options)
        assert _same(found, cascade_update(scores, fresh, stored, start, arrived, **options))
        stored, start, arrived = found.stored, found.start, arrived + fresh.shape[-1]
        scores = _after(found, scores, fresh)


def test_heads_choose_for_themselves() -> None:
    fresh = torch.tensor([[[9.0, 1, 1, 1, 9, 1], [1, 9, 1, 1, 1, 1]]])
    empty = torch.zeros(1, 2, 4)
    update = cascade_update(empty, fresh, (0, 0), (0, 0), 0, periods=(1, 2), width=2, eager=False)
    assert update.stored == (2, 2)
    ids = _after(update, torch.full((1, 2, 4), -1), torch.arange(6).expand(1, 2, 6))
    assert ids.tolist() == [[[4, 5, 0, 3], [4, 5, 1, 3]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "at least 1"),
        ({"periods": (1, 0)}, "at least 1"),
        ({"periods": (1, 2, 4)}, r"\[L, K, 6\]"),
        ({"fresh": torch.zeros(1, 1, 3)}, "fresh"),
        ({"fresh": torch.zeros(1, 2, 3, dtype=torch.float64)}, "fresh"),
        ({"stored": (2,)}, "as many"),
        ({"arrived": -1}, "arrivals"),
        ({"stored": (3, 0)}, "no ring"),
        ({"stored": (1, 0), "start": (1, 0)}, "no ring"),
        ({"stored": (2, 0), "start": (2, 0)}, "no ring"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    sound = {
        "scores": torch.zeros(1, 2, 4),
        "fresh": torch.zeros(1, 2, 3),
        "stored": (0, 0),
        "start": (0, 0),
        "arrived": 0,
        "periods": (1, 2),
        "width": 2,
    }
    with pytest.raises(ValueError, match=message):
        cascade_update(**(sound | changes))
