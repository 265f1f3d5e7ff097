"""The memory of what was surprising, against its definition token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.memory.base import Seen
from kvrag.memory.salient import Salient
from kvrag.memory.slots import in_order
from kvrag.memory.surprise import surprise
from kvrag.memory.window import Window


def kept_by_rule(worth: list[float], sinks: int, pool: int, width: int, half_life: float) -> list[int]:
    """Which tokens stay, one by one: whoever leaves the window competes with those that left it before."""
    front, old, window = [], [], []
    for i in range(len(worth)):
        if len(front) < sinks:
            front.append(i)
            continue
        window.append(i)
        if len(window) > width:
            old.append(window.pop(0))
            if len(old) > pool:
                old.remove(min(old, key=lambda j: (math.log2(worth[j]) + j / half_life, j)))
    return front + old + window


@given(
    data=st.data(),
    budget=st.integers(2, 24),
    recent=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    sinks=st.integers(0, 3),
    half_life=st.sampled_from((0.1, 1.0, 30.0)),
)
def test_it_keeps_what_the_rule_keeps_whatever_the_strides(
    data: st.DataObject, budget: int, recent: float, sinks: int, half_life: float
) -> None:
    sinks = min(sinks, budget - 1)
    policy = Salient(budget, recent=recent, half_life=half_life, sinks=sinks)
    worth = data.draw(st.lists(st.sampled_from((0.25, 1.0, 3.0, 8.0)), min_size=1, max_size=80))
    state, at = policy.start(3, 2), 0
    while at < len(worth):
        stride = data.draw(st.integers(1, len(worth) - at))
        fresh = torch.tensor(worth[at : at + stride]).expand(3, 1, -1)
        state.take(stride, Seen(torch.zeros(state.ids.shape), fresh))
        at += stride
    room = budget - sinks
    width = min(room, max(1, round(recent * room)))
    expected = kept_by_rule(worth, sinks, room - width, width, half_life * budget)
    assert in_order(state)[0, 0].tolist() == expected


def test_with_nothing_but_a_window_it_is_the_window() -> None:
    one, other = Salient(20, recent=1.0).start(2, 2), Window(20).start(2, 2)
    for stride in (1, 7, 30, 2, 50):
        one.take(stride, Seen(torch.zeros(one.ids.shape), torch.rand(2, 1, stride)))
        other.take(stride)
        assert torch.equal(in_order(one), in_order(other))


def test_heads_may_choose_for_themselves() -> None:
    state = Salient(10, recent=0.1, sinks=0, homogeneous=False, half_life=1e5).start(1, 2)
    fresh = torch.ones(1, 2, 40)
    fresh[0, 0, :5], fresh[0, 1, 10:15] = 9, 9
    state.take(40, Seen(torch.zeros(state.ids.shape), fresh))
    first, second = in_order(state)[0].tolist()
    assert first[:5] == [0, 1, 2, 3, 4]
    assert second[:5] == [10, 11, 12, 13, 14]


def test_a_message_is_worth_its_mean_loss() -> None:
    losses = torch.tensor([[1.0, 3.0, 5.0, 0.0, 2.0]])
    ends = torch.tensor([[False, True, False, False, False]])
    assert surprise(losses, ends).tolist() == [[2.0, 2.0, *[pytest.approx(7 / 3)] * 3]]


@pytest.mark.parametrize(
    "settings", [{"budget": 4}, {"budget": 9, "recent": 1.5}, {"budget": 9, "half_life": 0.0}]
)
def test_settings_that_cannot_work(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Salient(**settings)
