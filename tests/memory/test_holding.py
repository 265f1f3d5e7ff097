"""What a memory holds, counted by its slots, is what counting every token gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.memory import holding
from kvrag.memory.holding import Holding


@st.composite
def memories(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Slots of some layers and heads, each token at most once in each, and how many tokens there were."""
    seen = draw(st.integers(0, 60))
    layers, heads, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 20))
    ids = torch.full((layers, heads, capacity), -1)
    for layer in range(layers):
        for head in range(heads):
            kept = draw(st.lists(st.integers(0, max(0, seen - 1)), unique=True, max_size=min(seen, capacity)))
            ids[layer, head, : len(kept)] = torch.tensor(kept, dtype=torch.long)
    return ids, seen


@pytest.mark.parametrize("dense", [0, 1000], ids=["sorted", "counted"])
@given(memory=memories(), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_counting_slots_is_counting_tokens(
    dense: int, memory: tuple[torch.Tensor, int], share: float
) -> None:
    ids, seen = memory
    groups = ids.shape[0] * ids.shape[1]
    shares = torch.zeros(seen)
    for group in ids.reshape(groups, -1):
        shares[group[group >= 0]] += 1
    shares /= groups
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(holding, "_DENSE", dense)
        found = Holding(ids, seen)
    assert found.num_tokens == int((shares > 0).sum())
    assert found.share == pytest.approx(float(shares.mean()) if seen else 1.0)
    for start in range(0, seen, 7):
        for end in range(start + 1, seen + 1, 5):
            assert found.share_of(start, end) == pytest.approx(float(shares[start:end].mean()), abs=1e-6)
    lost = (shares < share).nonzero()
    assert found.last_below(share) == (int(lost[-1]) if len(lost) else None)


def test_a_long_chat_takes_no_more_than_a_short_one() -> None:
    ids = torch.arange(8).reshape(1, 1, 8)
    ids[..., 4:] += 10**9
    found = Holding(ids, 10**9 + 8)
    assert found.num_tokens == 8
    assert found.share == 8 / (10**9 + 8)
    assert sum(tensor.numel() for tensor in (found.tokens, found.counts)) == 16
    assert found.last_below(0.5) == 10**9 + 3
    assert found.share_of(10**9 + 2, 10**9 + 6) == 0.5
