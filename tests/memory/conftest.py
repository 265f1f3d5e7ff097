"""Recorded vectors, and a plain attention over whatever a memory keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.memory.base import MemoryState, Seen
from kvrag.memory.slots import in_order

GOLDEN = Path(__file__).parents[1] / "golden"
Cases = list[dict[str, Any]]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Cases]:
    """The cases of a file of recorded vectors."""

    def load(name: str) -> Cases:
        cases: Cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
        return cases

    return load


@pytest.fixture
def ids_of() -> Callable[[MemoryState], list[list[list[int]]]]:
    """Tokens that each layer and head keeps, oldest first."""

    def ids(state: MemoryState) -> list[list[list[int]]]:
        found: list[list[list[int]]] = in_order(state).tolist()
        return found

    return ids


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[..., n, D] turned by its positions: base 10000, halves rotated against each other."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() / 10_000 ** (torch.arange(half) / half)
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PlainAttention:
    """The first layer's attention in float32 over a memory and the stride; keys lie unrotated in slots.

    Args:
        state: an empty memory; its other layers see what the first one sees.
        kv_heads: K.
        dim: D.
    """

    def __init__(self, state: MemoryState, kv_heads: int, dim: int) -> None:
        self.state = state
        self.keys, self.values = torch.zeros(2, kv_heads, state.capacity, dim)

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with [H, n, D] queries, [K, n, D] keys and values, then insert: [n, H, D]."""
        runs, num_new = self.state.runs, k.shape[1]
        slots = [slot for run in runs for slot in range(run.slot, run.slot + run.length)]
        positions = torch.arange(len(slots) + num_new)
        groups = q.shape[0] // k.shape[0]
        keys = torch.cat([self.keys[:, slots], k], dim=1)
        values = torch.cat([self.values[:, slots], v], dim=1).repeat_interleave(groups, 0)
        turned = rotated(keys, positions).repeat_interleave(groups, 0)
        scores = rotated(q, positions[len(slots) :]) @ turned.transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = torch.ones(num_new, len(positions), dtype=torch.bool).triu(1 + len(slots))
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        self._insert(k, v, self._seen(probs, slots))
        return (probs @ values).transpose(0, 1)

    def _seen(self, probs: torch.Tensor, slots: list[int]) -> Seen | None:
        watching = self.state.watching
        if watching is None:
            return None
        paid = torch.einsum("q,hqk->hk", watching.weights(probs.shape[1]), probs)
        grouped = paid.view(self.state.ids.shape[1], -1, paid.shape[-1])
        reduced = {
            "mean": grouped.mean(1),
            "max": grouped.amax(1),
            "median": grouped.median(1).values,
        }[watching.reduction]
        old = torch.zeros(1, len(reduced), self.state.capacity)
        old[0][:, slots] = reduced[:, : len(slots)]
        fresh = reduced[None, :, len(slots) :]
        layers = self.state.ids.shape[0]
        return Seen(old.expand(layers, -1, -1), fresh.expand(layers, -1, -1))

    def _insert(self, k: torch.Tensor, v: torch.Tensor, seen: Seen | None) -> None:
        moves = self.state.take(k.shape[1], seen)
        sources = moves.sources[0].expand(k.shape[0], -1)
        for name, new in (("keys", k), ("values", v)):
            old = getattr(self, name)
            grown = torch.zeros(k.shape[0], self.state.capacity, k.shape[-1])
            grown[:, : old.shape[1]] = old
            places = sources[..., None].expand(-1, -1, k.shape[-1])
            grown[:, moves.slots] = torch.cat([old, new], dim=1).gather(1, places)
            setattr(self, name, grown)


@pytest.fixture(scope="session")
def plain_attention() -> type[PlainAttention]:
    """The class, for tests that read several memories."""
    return PlainAttention
