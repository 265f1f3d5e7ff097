"""A ladder over a cascade is either of them at its ends, and lets layers keep different tokens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryState
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.slots import in_order
from kvrag.testing.memories import static_seen

LAYERS, HEADS = 9, 2
few = settings(max_examples=10)


def _fed(policy: Cascade, scores: torch.Tensor, stride: int = 40) -> MemoryState:
    state = policy.start(LAYERS, HEADS)
    for fresh in scores.split(stride, dim=-1):
        state.take(fresh.shape[-1], static_seen(state, fresh))
    return state


def _scores(seed: int, num_tokens: int = 300, *, is_alike: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((1 if is_alike else LAYERS, HEADS, num_tokens), generator=generator) + 0.01
    return scores.expand(LAYERS, -1, -1)


sizes = {"sub_caches": st.integers(1, 4), "schedule": st.sampled_from(["pow2", "pow3", "iplus1", "1-then-2"])}


@few
@given(seed=st.integers(0, 2**31), **sizes)
def test_without_a_bonus_it_is_the_cascade(seed: int, sub_caches: int, schedule: str) -> None:
    options: dict[str, Any] = {"sub_caches": sub_caches, "schedule": schedule, "beta": 1.0}
    scores = _scores(seed)
    one, other = LadderCascade(30, bonus=0.0, **options), Cascade(30, **options)
    if one.start(1, 1).watching is not None:
        assert torch.equal(_fed(one, scores).ids, _fed(other, scores).ids)


@few
@given(seed=st.integers(0, 2**31), width=st.integers(1, 6))
def test_with_a_huge_bonus_each_layer_keeps_its_own_residue(seed: int, width: int) -> None:
    policy = LadderCascade(4 + 4 * width, sub_caches=4, sinks=4, beta=1.0, bonus=1e8)
    state = _fed(policy, _scores(seed), stride=23)
    assert (state.seen - 4) % 8 == 0  # no match is still to come
    arrivals = (state.ids[..., 4:] - 4).view(LAYERS, HEADS, 4, width)
    for level in range(4):
        residues = torch.arange(LAYERS)[:, None, None] % 2**level
        assert (arrivals[:, :, level] % 2**level == residues).all()


@few
@given(seed=st.integers(0, 2**31), stride=st.integers(1, 120))
def test_strides_make_no_difference(seed: int, stride: int) -> None:
    policy, scores = LadderCascade(30, beta=1.0, bonus=2.0), _scores(seed)
    one, other = _fed(policy, scores, stride), _fed(policy, scores, 300)
    assert torch.equal(one.ids, other.ids)


def test_layers_that_look_alike_keep_more_tokens_together() -> None:
    scores = _scores(3, 4 + 8 * 100, is_alike=True)
    kept = [
        len(set(in_order(_fed(LadderCascade(68, beta=1.0, bonus=bonus), scores))[:, 0].flatten().tolist()))
        for bonus in (0.0, 0.5, 1e8)
    ]
    assert kept[0] == 68  # all layers choose the same
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] == 4 + 16 * (1 + 2 + 4 + 8)


def test_a_token_that_is_looked_at_much_stays_against_the_bonus() -> None:
    scores = _scores(4, 230)
    scores = scores.clone()
    scores[..., 101] = 1000.0
    mild, huge = (LadderCascade(68, beta=1.0, bonus=bonus) for bonus in (1.0, 1e8))
    assert (_fed(mild, scores).ids == 101).any(-1).all()
    holding = (_fed(huge, scores).ids == 101).any(-1)
    assert holding.any()
    assert not holding.all()


def test_a_restored_memory_knows_what_its_layers_want() -> None:
    policy, scores = LadderCascade(30, beta=1.0, bonus=1.0), _scores(5)
    one, other = _fed(policy, scores[..., :200]), policy.start(LAYERS, HEADS)
    other.restore(one.state())
    for state in (one, other):
        state.take(100, static_seen(state, scores[..., 200:]))
    assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("bonus", [-0.5, float("nan"), float("inf"), 1e12])
def test_a_bonus_that_scores_cannot_bear_is_refused(bonus: float) -> None:
    with pytest.raises(ConfigError, match="bonus"):
        LadderCascade(100, bonus=bonus)
