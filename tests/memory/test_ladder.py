"""What ladders and windows keep, whatever the sizes and the strides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.memory.ladder import Ladder, LadderState
from kvrag.memory.slots import in_order, without
from kvrag.memory.window import Window
from kvrag.testing.memories import assert_same_state

few = settings(max_examples=15)  # of what is fed token by token
strides_of = st.lists(st.integers(0, 150), max_size=12)


@st.composite
def ladders(draw: st.DrawFn, **fixed: Any) -> tuple[Ladder, int]:
    """A ladder and the number of layers of a model that it works for."""
    num_layers = draw(st.integers(2, 12))
    span = draw(st.integers(1, num_layers - 1))
    # A larger overlap may leave nothing to remove: B - A must be 1 at least.
    overlaps = [
        o for o in range(span) if (num_layers - span) // (span - o) >= 1 and _removes(num_layers, span, o)
    ]
    if not overlaps:
        span, overlaps = 1, [0]
    overlap, sinks = draw(st.sampled_from(overlaps)), draw(st.integers(0, 5))
    rungs = Ladder(1, span, overlap).rungs(num_layers)
    budget = sinks + num_layers + rungs.kept + draw(st.integers(0, 30))
    return Ladder(budget, span, overlap, sinks, **({"consecutive": draw(st.booleans())} | fixed)), num_layers


def _removes(num_layers: int, span: int, overlap: int) -> bool:
    step = span - overlap
    return 1 + -(-(num_layers - span) // step) > -(-span // step)


def _start(case: tuple[Ladder, int]) -> tuple[Ladder, int, LadderState, int]:
    policy, num_layers = case
    return policy, num_layers, policy.start(num_layers, 1), policy.rungs(num_layers).removed


@few
@given(case=ladders(), num_tokens=st.integers(0, 200))
def test_length_stays_just_below_the_budget(case: tuple[Ladder, int], num_tokens: int) -> None:
    policy, _, state, removed = _start(case)
    for _ in range(num_tokens):
        state.take(1)
        (run,) = state.runs
        assert run.length <= policy.budget
        if state.seen <= policy.budget:
            assert run.length == state.seen
        else:
            assert run.length > policy.budget - removed


@few
@given(case=ladders(), strides=strides_of)
def test_strides_make_no_difference(case: tuple[Ladder, int], strides: list[int]) -> None:
    _, _, state, _ = _start(case)
    _, _, one_by_one, _ = _start(case)
    for stride in strides:
        state.take(stride)
        for _ in range(stride):
            one_by_one.take(1)
        assert_same_state(state, one_by_one)


@given(case=ladders(), strides=strides_of)
def test_sinks_and_the_last_tokens_are_in_every_layer(case: tuple[Ladder, int], strides: list[int]) -> None:
    policy, num_layers, state, removed = _start(case)
    for stride in strides:
        state.take(stride)
        kept = in_order(state)
        count = min(policy.sinks, state.seen)
        assert (kept[..., :count] == torch.arange(count)).all()
        newest = min(num_layers - removed + 1, state.seen)
        assert (kept[..., kept.shape[-1] - newest :] == torch.arange(state.seen - newest, state.seen)).all()
        assert (kept.diff(dim=-1) > 0).all()


@given(case=ladders(consecutive=False), strides=strides_of)
def test_layers_repeat(case: tuple[Ladder, int], strides: list[int]) -> None:
    _, num_layers, state, removed = _start(case)
    for stride in strides:
        state.take(stride)
    for layer in range(num_layers - removed - 1):
        assert torch.equal(state.ids[layer], state.ids[layer + removed + 1])


@given(case=ladders())
def test_one_ladder_loses_nothing_in_all_layers_together(case: tuple[Ladder, int]) -> None:
    policy, num_layers, state, removed = _start(case)
    state.take(policy.budget + 1)
    kept = in_order(state)
    assert kept.shape[-1] == policy.budget + 1 - removed
    if not policy.consecutive:
        assert num_layers >= removed + 1
    assert set(kept.flatten().tolist()) == set(range(policy.budget + 1))


@given(parts=st.integers(2, 5), span=st.integers(1, 5), is_consecutive=st.booleans())
def test_a_token_stays_in_as_many_layers_as_the_span(parts: int, span: int, is_consecutive: bool) -> None:
    num_layers = parts * span
    policy = Ladder(4 + num_layers + 20, span, consecutive=is_consecutive)
    rungs = policy.rungs(num_layers)
    assert (rungs.group, rungs.kept) == (parts, 1)
    state = policy.start(num_layers, 1)
    state.take(policy.budget + 1)
    layers = Counter(in_order(state).flatten().tolist())
    assert [layers[token] for token in range(4, 4 + rungs.group)] == [span] * rungs.group
    if is_consecutive:
        for token in range(4, 4 + rungs.group):
            (holding,) = (state.ids == token).any(-1).any(-1).nonzero(as_tuple=True)
            assert holding.tolist() == [*range(span * (token - 4), span * (token - 3))]


def test_density_falls_with_age() -> None:
    state = Ladder(256, span=16).start(32, 1)
    state.take(4096)
    ages = 4095 - in_order(state)
    counts = [((ages >= first) & (ages < 2 * first)).sum() / (32 * first) for first in (128, 256, 512, 1024)]
    assert all(a > b for a, b in pairwise(counts))
    together = len(set(in_order(state).flatten().tolist()))
    assert together == 376  # what the published code keeps in all layers together


@pytest.mark.parametrize(
    ("budget", "span", "overlap", "num_layers", "expected"),
    [
        (99, 16, 0, 32, (2, 1)),
        (99, 8, 4, 32, (7, 2)),
        (99, 9, 3, 32, (5, 2)),
        (99, 9, 7, 24, (9, 5)),
        (99, 14, 0, 28, (2, 1)),
    ],
)
def test_sizes_of_published_ladders(
    budget: int, span: int, overlap: int, num_layers: int, expected: tuple[int, int]
) -> None:
    rungs = Ladder(budget, span, overlap).rungs(num_layers)
    assert (rungs.group, rungs.kept) == expected


@pytest.mark.parametrize(
    ("settings", "num_layers", "message"),
    [
        ({"span": 4}, 4, "removes nothing"),
        ({"span": 9}, 4, "removes nothing"),
        ({"span": 4, "overlap": 2}, 4, "removes nothing"),
        ({"span": 1}, 1, "two layers"),
        ({"span": 0}, 4, "span"),
        ({"span": 2, "overlap": 2}, 4, "overlap"),
        ({"span": 2, "budget": 8}, 4, "needs 9"),
        ({"span": 2, "sinks": -1}, 4, "sinks"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], num_layers: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Ladder(**({"budget": 64} | settings)).start(num_layers, 1)


@given(budget=st.integers(1, 30), sinks=st.integers(0, 6), pinned=st.integers(0, 9), strides=strides_of)
def test_a_window_keeps_the_first_and_the_last(
    budget: int, sinks: int, pinned: int, strides: list[int]
) -> None:
    state = Window(budget + sinks, sinks=sinks).start(2, 3, pinned=pinned)
    own = max(0, sinks - pinned)
    for stride in strides:
        state.take(stride)
        first = min(own, state.seen)
        last = range(max(first, state.seen - (budget + sinks - own)), state.seen)
        assert in_order(state)[1, 0].tolist() == [*range(first), *last]


def test_a_window_needs_room_beside_its_sinks() -> None:
    with pytest.raises(ConfigError, match="need 5"):
        Window(4)


@given(
    lengths=st.lists(st.integers(1, 9), max_size=5),
    first=st.integers(0, 30),
    length=st.integers(0, 30),
)
def test_a_range_taken_out_of_runs(lengths: list[int], first: int, length: int) -> None:
    state = Window(max(1, sum(lengths)), sinks=0).start(1, 1)
    for stride in lengths:
        state.take(stride + 1)
    slots = [slot for run in state.runs for slot in range(run.slot, run.slot + run.length)]
    left = without(state.runs, first, first + length)
    assert [s for run in left for s in range(run.slot, run.slot + run.length)] == [
        *slots[:first],
        *slots[first + length :],
    ]
    assert [r for run in left for r in range(run.rank, run.rank + run.length)] == [
        *range(sum(run.length for run in left))
    ]
