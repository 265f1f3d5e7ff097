"""Attention over what a memory keeps: dense below the budget, and scores as attention was paid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.slots import in_order
from kvrag.memory.window import Window

HEADS, KV_HEADS, DIM = 4, 2, 8
POLICIES = {
    "full": Full(),
    "window": Window(60),
    "cascade": Cascade(60, sub_caches=3),
    "homogeneous cascade": Cascade(60, homogeneous=True, reduction="mean"),
    "ladder": Ladder(60, span=1),
    "combined": LadderCascade(60),
}


def _rows(seed: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((HEADS + 2 * KV_HEADS, num_tokens, DIM), generator=generator)
    return rows.split([HEADS, KV_HEADS, KV_HEADS])


def _read(attention: Any, rows: tuple[torch.Tensor, ...], strides: list[int]) -> torch.Tensor:
    return torch.cat([attention.read(*x) for x in zip(*(r.split(strides, dim=1) for r in rows), strict=True)])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@given(seed=st.integers(0, 2**31), strides=st.lists(st.integers(1, 12), min_size=1, max_size=5))
@settings(max_examples=8)
def test_below_the_budget_it_is_dense(
    plain_attention: Any, policy: MemoryPolicy, seed: int, strides: list[int]
) -> None:
    rows = _rows(seed, sum(strides))
    dense = plain_attention(Full().start(1, KV_HEADS), KV_HEADS, DIM)
    mine = plain_attention(policy.start(2, KV_HEADS), KV_HEADS, DIM)
    torch.testing.assert_close(
        _read(mine, rows, strides), _read(dense, rows, [sum(strides)]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("beta", [0.9, 0.9999, 1.0])
@given(seed=st.integers(0, 2**31), strides=st.lists(st.integers(1, 12), min_size=1, max_size=4))
@settings(max_examples=8)
def test_strides_make_no_difference_to_scores(
    plain_attention: Any, beta: float, seed: int, strides: list[int]
) -> None:
    """While attention is the same, and for a mean over heads: maxima of parts do not add up."""
    policy = Cascade(50, beta=beta, reduction="mean")
    rows = _rows(seed, sum(strides))
    found = []
    for lengths in (strides, [1] * sum(strides)):
        state = policy.start(1, KV_HEADS)
        _read(plain_attention(state, KV_HEADS, DIM), rows, lengths)
        found.append(state.scores[..., policy.sinks :])
    torch.testing.assert_close(*found)


@given(seed=st.integers(0, 2**31), num_tokens=st.integers(1, 30))
@settings(max_examples=8)
def test_scores_of_one_head_add_up(plain_attention: Any, seed: int, num_tokens: int) -> None:
    policy = Cascade(60, sinks=0, beta=0.9)
    state = policy.start(1, 1)
    q, k, v = _rows(seed, num_tokens)
    plain_attention(state, 1, DIM).read(q[:1], k[:1], v[:1])
    assert float(state.scores.sum()) == pytest.approx(1 - 0.9**num_tokens, rel=1e-5)
    assert (state.scores >= 0).all()
    assert (state.scores <= 1).all()


def test_far_beyond_the_budget_attention_stays_within_it(plain_attention: Any) -> None:
    policy = Cascade(28, sub_caches=3, sinks=4, beta=0.9)
    state = policy.start(1, KV_HEADS)
    attention = plain_attention(state, KV_HEADS, DIM)
    out = _read(attention, _rows(7, 900), [5, 95, 300, 500])
    assert torch.isfinite(out).all()
    assert attention.keys.shape[1] == 28
    kept = in_order(state)[0]
    for head in range(KV_HEADS):
        torch.testing.assert_close(
            attention.keys[head, [s for run in state.runs for s in range(run.slot, run.slot + run.length)]],
            _rows(7, 900)[1][head, kept[head]],
            rtol=0,
            atol=0,
        )
