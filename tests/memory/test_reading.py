"""Reading into a memory: below its budget it is dense attention; beyond it, what the policy says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrag.errors import ContextOverflow
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.reading import StrideRows
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.rotary import rotate
from kvrag.testing.models import tiny
from kvrag.testing.rings import Ring, memory_reader

TEXT = tuple(int(x) for x in torch.randint(6, 300, (90,), generator=torch.Generator().manual_seed(3)))
FAMILIES = [
    "llama",
    "mistral-window",
    "gemma2",
    "gemma3",
    "smollm3",
    "gpt_oss",
    "glm4",
    "cohere2",
    "deepseek_v3",
    "llama-yarn",
]


@cache
def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return tiny(family, dtype=dtype)


def dense(found: Model, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = found.network(torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stride", [1, 7, 128])
def test_below_the_budget_it_is_dense_attention(family: str, stride: int) -> None:
    found = model(family)
    mine = memory_reader(found, Ring(96), stride=stride)
    for end in (30, 60, 90):
        logits = mine.read(TEXT[end - 30 : end]).logits[-1]
        expected = dense(found, TEXT[:end])[-1]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


class Explicit:
    """A tiny Llama written out: rows of the window kept unrotated in lists, rotated anew at their ranks."""

    def __init__(self, found: Model, budget: int, sinks: int) -> None:
        self.network: Any = found.network
        self.budget, self.sinks = budget, sinks
        self.kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in found.specs]

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[H, T, D]."""
        half = x.shape[-1] // 2
        frequencies = 1e4 ** (-torch.arange(half).double() / half)
        angles = positions.double()[:, None] * frequencies
        cos, sin = angles.cos().repeat(1, 2).float(), angles.sin().repeat(1, 2).float()
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos + turned * sin

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """One stride, inserted behind its attention; logits of its last token."""
        hidden = self.network.model.embed_tokens(torch.tensor(list(tokens)))
        num = len(tokens)
        for layer, kept in zip(self.network.model.layers, self.kept, strict=True):
            x = layer.input_layernorm(hidden)
            attention = layer.self_attn
            q, k, v = (
                projection(x).view(num, -1, 16).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys = torch.stack([*(key for key, _ in kept), *k.unbind(1)], dim=1)
            values = torch.stack([*(value for _, value in kept), *v.unbind(1)], dim=1)
            positions = torch.arange(len(kept) + num)
            allowed = torch.ones(num, len(positions), dtype=torch.bool).tril(len(kept))
            out = F.scaled_dot_product_attention(
                self._rotated(q, positions[len(kept) :]),
                self._rotated(keys, positions).repeat_interleave(2, dim=0),
                values.repeat_interleave(2, dim=0),
                attn_mask=allowed,
            )
            hidden = hidden + attention.o_proj(out.transpose(0, 1).reshape(num, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            kept.extend(zip(k.unbind(1), v.unbind(1), strict=True))
            del kept[self.sinks : max(self.sinks, len(kept) - self.budget + self.sinks)]
        logits: torch.Tensor = self.network.lm_head(self.network.model.norm(hidden[-1]))
        return logits


@pytest.mark.parametrize(("budget", "sinks", "stride"), [(20, 4, 8), (17, 0, 5), (12, 3, 1), (10, 2, 30)])
def test_a_window_is_what_it_is_when_written_out(budget: int, sinks: int, stride: int) -> None:
    found = model()
    mine = memory_reader(found, Ring(budget, sinks), stride=stride)
    written_out = Explicit(found, budget, sinks)
    for start in range(0, 90, stride):
        piece = TEXT[start : start + stride]
        logits = mine.read(piece).logits[-1]
        torch.testing.assert_close(logits, written_out.read(piece), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(90,), (1,) * 90, (13, 40, 37)])
def test_strides_do_not_depend_on_how_tokens_come(sizes: tuple[int, ...]) -> None:
    """A stride is a stride, in one pass or token by token."""
    found = model()
    mine, at = memory_reader(found, Ring(20), stride=10), 0
    for size in sizes:
        last = mine.read(TEXT[at : at + size])
        at += size
    expected = memory_reader(found, Ring(20), stride=10).read(TEXT)
    torch.testing.assert_close(last.logits[-1], expected.logits[-1], atol=2e-5, rtol=1e-4)


def test_memory_never_holds_more_than_budget_and_stride() -> None:
    found = model()
    mine = memory_reader(found, Ring(20), stride=8)
    sizes = set()
    for token in TEXT:
        mine.read([token])
        sizes.add(mine.table.num_tokens + mine.fresh.num_rows)
        assert mine.position == mine.table.num_tokens + mine.fresh.num_rows
    assert max(sizes) == 28
    assert mine.num_tokens == 90
    rows = sum(layer.keys.shape[1] for layer in mine.rows.layers)
    assert rows == 20 * found.num_layers


def test_listeners_hear_of_every_stride_once() -> None:
    found = model()
    mine = memory_reader(found, Ring(20), stride=8)
    heard: list[StrideRows] = []
    mine._listeners = (heard.append,)
    mine.read(TEXT[:20])
    mine.insert()
    assert [(x.first, len(x.tokens)) for x in heard] == [(0, 8), (8, 8), (16, 4)]
    assert sum((x.tokens for x in heard), ()) == TEXT[:20]
    assert heard[0].keys[0].shape == heard[0].values[0].shape == (2, 8, 16)
    mine.insert()
    assert len(heard) == 3


def test_what_is_not_inserted_can_be_taken_back() -> None:
    found = model()
    mine, other = (memory_reader(found, Ring(20), stride=8) for _ in range(2))
    mine.read(TEXT[:28])
    mine.read([7, 8])
    assert mine.drop(2)
    assert not mine.drop(5)
    other.read(TEXT[:28])
    torch.testing.assert_close(mine.read(TEXT[28:50]).logits, other.read(TEXT[28:50]).logits)


def test_positions_that_the_model_does_not_have_are_refused() -> None:
    short = Model(model().network, model().text.tokenizer, max_length=40)
    with pytest.raises(ContextOverflow, match="takes 48 positions and the model reads 40"):
        memory_reader(short, Ring(96), stride=8).read(TEXT)


POLICIES: list[MemoryPolicy] = [Full(), Window(96), Cascade(100), Ladder(96, span=2), LadderCascade(100)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "smollm3"])
def test_below_its_budget_every_policy_is_dense_attention(family: str, policy: MemoryPolicy) -> None:
    found = model(family)
    mine = memory_reader(found, policy, stride=13)
    for end in (45, 90):
        logits = mine.read(TEXT[end - 45 : end]).logits[-1]
        torch.testing.assert_close(logits, dense(found, TEXT[:end])[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [Window(20), Cascade(24), Ladder(20, span=2), LadderCascade(24)])
def test_no_policy_takes_more_than_budget_and_stride(policy: MemoryPolicy) -> None:
    found, budget = model(), policy.budget or 0
    mine = memory_reader(found, policy, stride=8)
    for token in TEXT:
        mine.read([token])
        assert mine.table.num_tokens <= budget
        assert mine.fresh.num_rows <= 8
    mine.insert()
    assert mine.table.num_tokens <= budget
    assert all(layer.keys.shape[1] <= budget for layer in mine.rows.layers)


@pytest.mark.parametrize("policy", [Cascade(24), LadderCascade(24)])
def test_in_sixteen_bits_keys_are_rotated_once(policy: MemoryPolicy) -> None:
    """However often a row has moved from one ring to the next."""
    found = model(dtype=torch.bfloat16)
    mine = memory_reader(found, policy, stride=8)
    mine.read(TEXT)
    mine.insert()
    for spec, layer in zip(found.specs, mine.rows.layers, strict=True):
        assert layer.raw is not None
        assert spec.rotation is not None
        turn = spec.rotation.turn(torch.arange(layer.keys.shape[1]))
        assert torch.equal(rotate(layer.raw[None], turn)[0], layer.keys)
