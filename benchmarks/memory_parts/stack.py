"""Many streams of equal length read side by side, each into a memory of its own.

The policies are those of `kvrag.memory`: one state decides for all streams at once, as if the key heads of
all of them were one layer's. What a policy decides for one head hangs on nothing but that head's scores and
on how many tokens came, so nobody notices. Rows are kept unrotated here and turned to their places when they
are read; tests/test_memory_benchmark.py holds the result against `kvrag.memory`'s own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from kvrag.backbone import AttentionCall
from kvrag.memory.base import MemoryPolicy, MemoryState, Moves, Seen, Watching
from kvrag.memory.surprise import surprise
from kvrag.model import Model

# What is made of the scores before the policy gets them: for controls.
Mending = Callable[[Seen], Seen]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of chosen tokens of every stream, unrotated.

    Attributes:
        keys: [B, L, K, n, D].
        values: [B, L, K, n, D].
        counts: [B]: how many of the n rows each stream has.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor


@dataclass(slots=True)
class Look:
    """What some layers pay to recalled rows.

    Attributes:
        layers: which.
        rows: [B], the row of each stream whose attention counts.
        found: of each of them [B, H, n], once it was read.
    """

    layers: Collection[int]
    rows: torch.Tensor
    found: list[torch.Tensor] = field(default_factory=list)


class Turning:
    """Cosines and sines of the model's positions."""

    def __init__(self, model: Model, num_positions: int, device: torch.device) -> None:
        rotations = {spec.rotation for spec in model.specs}
        if len(rotations) != 1 or (rotation := rotations.pop()) is None or rotation.layout != "half":
            raise ValueError("streams are read side by side by models with one ordinary rotation only")
        turn = rotation.turn(torch.arange(num_positions, device=device))
        self.cos, self.sin = turn.cos[0], turn.sin[0]

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate [B, H, T, D] to positions [T] or [B, T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        one, other = x.chunk(2, dim=-1)
        return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class _Pass:
    """The attention of one forward pass over all streams (see `kvrag.backbone.Reading`)."""

    def __init__(
        self,
        stack: Stack,
        memory_at: torch.Tensor,
        fresh_at: torch.Tensor,
        weights: torch.Tensor | None = None,
        recalled: Rows | None = None,
        recalled_at: torch.Tensor | None = None,
        look: Look | None = None,
    ) -> None:
        self.stack, self.weights, self.recalled, self.look = stack, weights, recalled, look
        self.memory_at, self.fresh_at, self.recalled_at = memory_at, fresh_at, recalled_at
        self.fresh: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.columns: list[torch.Tensor] = []
        self._added = self._mask()

    def _mask(self) -> torch.Tensor:
        """[B or 1, 1, T, N] of what to add to scores."""
        num, before = self.fresh_at.shape[-1], self.memory_at.shape[-1]
        causal = torch.full((num, num), float("-inf")).triu(1)
        parts = [torch.zeros(num, before), causal]
        if self.recalled is None:
            return torch.cat(parts, 1)[None, None]
        hidden = torch.arange(self.recalled.keys.shape[3]) >= self.recalled.counts[:, None]
        added = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        batch = len(added)
        wide = [p.expand(batch, 1, num, -1) for p in parts]
        return torch.cat((wide[0], added[:, None, None].expand(-1, 1, num, -1), wide[1]), 3)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        stack, turned = self.stack, self.stack.turning
        query, fresh = turned(call.query, self.fresh_at), turned(call.key, self.fresh_at)
        self.fresh.append((call.key, call.value))
        keys, values = stack.rows(layer)
        keys, values = [turned(keys, self.memory_at)], [values]
        if self.recalled is not None:
            assert self.recalled_at is not None
            keys.append(turned(self.recalled.keys[:, layer], self.recalled_at))
            values.append(self.recalled.values[:, layer])
        key, value = torch.cat((*keys, fresh), 2), torch.cat((*values, call.value), 2)
        if self.weights is None and (self.look is None or layer not in self.look.layers):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=self._added, scale=call.scale, enable_gqa=True
            )
        batch, heads, num, dim = query.shape
        num_kv, total = key.shape[1], key.shape[2]
        scores = (query.view(batch, num_kv, -1, dim) * call.scale) @ key.transpose(-1, -2)
        probs = scores.view(batch, heads, num, total).add_(self._added).softmax(-1)
        if self.weights is not None:
            self.columns.append(torch.einsum("t,bhtn->bhn", self.weights, probs))
        if self.look is not None and self.recalled is not None:
            columns = slice(self.memory_at.shape[-1], total - num)
            self.look.found.append(probs[torch.arange(batch), :, self.look.rows][..., columns].clone())
        return (probs.view(batch, num_kv, -1, total) @ value).view(batch, heads, num, dim)

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided here."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """There is none."""


class Stack:
    """Streams side by side, and what their memories hold.

    Attributes:
        state: what the policy keeps of all of them: key head k of stream b is its head b * K + k.
        keys: [L, B, K, C, D], unrotated.
        values: [L, B, K, C, D].
        num_read: tokens of each stream so far.
    """

    def __init__(
        self,
        model: Model,
        policy: MemoryPolicy,
        num_streams: int,
        *,
        mend: Mending | None = None,
        positions: int = 1 << 16,
    ) -> None:
        config = model.network.config
        self.model, self.mend = model, mend
        self.layers, self.kv_heads = model.num_layers, config.num_key_value_heads
        self.dim = config.head_dim
        self.num_streams, self.num_read = num_streams, 0
        self.state: MemoryState = policy.start(self.layers, num_streams * self.kv_heads)
        self.turning = Turning(model, positions, model.device)
        shape = (self.layers, num_streams, self.kv_heads, 0, self.dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self._last: torch.Tensor | None = None
        self._order, self._at = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, m, D] of what is in memory, in order of rank."""
        keys, values = self.keys[layer], self.values[layer]
        if len(self._order) == keys.shape[2]:
            return keys, values  # all slots are taken, and order does not matter
        return keys[:, :, self._order], values[:, :, self._order]

    @property
    def num_kept(self) -> int:
        """Entries of every head."""
        return len(self._order)

    @torch.inference_mode()
    def read(self, ids: torch.Tensor, *, want_losses: bool = False) -> tuple[torch.Tensor | None, _Pass]:
        """Read a stride of every stream, [B, q], and insert it.

        Returns:
            Negative log-likelihood of each token given those before, [B, q], if wanted (0 for the very
            first); the pass, with its fresh rows.
        """
        watching, losses = self.state.watching, None
        by_surprise = watching is not None and watching.surprise
        weights = watching.weights(ids.shape[1]) if watching and not by_surprise else None
        run = self._pass(ids.shape[1], weights)
        logits = self.model.run(ids, run, logits_to_keep=0 if want_losses or by_surprise else 1)
        if want_losses or by_surprise:
            losses = self._losses(logits, ids)
        seen = None
        if by_surprise:
            assert losses is not None
            seen = self._surprising(losses, ids)
        elif watching is not None:
            seen = self._seen(run, watching)
        if seen is not None and self.mend is not None:
            seen = self.mend(seen)
        self._apply(self.state.take(ids.shape[1], seen), run.fresh)
        self.num_read += ids.shape[1]
        return losses, run

    def _losses(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        batch, num, size = logits.shape
        before = logits[:, :1] if self._last is None else self._last
        shifted = torch.cat((before, logits[:, :-1]), 1)
        losses = F.cross_entropy(shifted.reshape(-1, size), ids.reshape(-1), reduction="none")
        losses = losses.view(batch, num)
        if self._last is None:
            losses[:, 0] = 0
        self._last = logits[:, -1:].clone()
        return losses

    def _surprising(self, losses: torch.Tensor, ids: torch.Tensor) -> Seen:
        """The same for all layers and heads of a stream."""
        worth = surprise(losses, ids == self.model.text.tokenizer.eos_token_id)
        shape = (self.layers, self.num_streams, self.kv_heads, ids.shape[1])
        fresh = worth[None, :, None].expand(shape).reshape(self.layers, -1, ids.shape[1])
        return Seen(fresh.new_zeros((*fresh.shape[:2], self.state.capacity)), fresh)

    @torch.inference_mode()
    def ask(
        self, ids: torch.Tensor, recalled: Rows | None = None, *, num_front: int = 0, look: Look | None = None
    ) -> torch.Tensor:
        """Logits, [B, n, V], of one question per stream, [B, n]; nothing is inserted.

        Args:
            ids: padded behind.
            recalled: rows that stand between the first entries and the others.
            num_front: how many entries stand before them.
            look: filled with what some layers pay to them.
        """
        run = self._pass(ids.shape[1], None, recalled, num_front, look)
        return self.model.run(ids, run, logits_to_keep=0)

    def _pass(
        self,
        num: int,
        weights: torch.Tensor | None,
        recalled: Rows | None = None,
        num_front: int = 0,
        look: Look | None = None,
    ) -> _Pass:
        memory_at = self._at
        fresh_at = torch.arange(self.num_kept, self.num_kept + num)
        recalled_at = None
        if recalled is not None:
            counts = recalled.counts[:, None]
            memory_at = memory_at[None] + torch.where(memory_at < num_front, 0, counts)
            fresh_at = fresh_at[None] + counts
            recalled_at = torch.arange(recalled.keys.shape[3]).expand(len(counts), -1) + num_front
        return _Pass(self, memory_at, fresh_at, weights, recalled, recalled_at, look)

    def _seen(self, run: _Pass, watching: Watching) -> Seen:
        """Scores as the policy wants them."""
        columns = torch.stack(run.columns)  # [L, B, H, N]
        layers, batch, heads, total = columns.shape
        grouped = columns.view(layers, batch, self.kv_heads, heads // self.kv_heads, total)
        reduced = _reduced(grouped, watching.reduction)
        flat = reduced.reshape(layers, batch * self.kv_heads, total)
        slots = flat.new_zeros((*flat.shape[:2], self.state.capacity))
        before = self.num_kept
        places = self._order if before < self.keys.shape[3] else torch.arange(before)
        slots[:, :, places] = flat[:, :, :before]
        return Seen(slots, flat[:, :, before:].contiguous())

    def _apply(self, moves: Moves, fresh: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write what changes its slot."""
        capacity, before = self.state.capacity, moves.num_before
        m = len(moves.slots)
        sources = moves.sources.expand(self.layers, self.num_streams * self.kv_heads, m)
        sources = sources.reshape(self.layers, self.num_streams, self.kv_heads, m)
        if capacity > self.keys.shape[3]:
            self.keys, self.values = (self._grown(x, capacity) for x in (self.keys, self.values))
        for layer, new in enumerate(fresh):
            index = sources[layer][..., None].expand(-1, -1, -1, self.dim)
            for kept, rows in zip((self.keys[layer], self.values[layer]), new, strict=True):
                every = torch.cat((kept[:, :, :before], rows), 2)
                kept[:, :, moves.slots] = every.gather(2, index)
        slots, ranks = [], []
        for run in self.state.runs:
            slots.append(torch.arange(run.slot, run.slot + run.length))
            ranks.append(torch.arange(run.rank, run.rank + run.length))
        self._order, rank = torch.cat(slots), torch.cat(ranks)
        self._at = rank if len(self._order) < self.keys.shape[3] else _scattered(self._order, rank)

    @staticmethod
    def _grown(x: torch.Tensor, capacity: int) -> torch.Tensor:
        new = x.new_zeros((*x.shape[:3], capacity, x.shape[4]))
        new[:, :, :, : x.shape[3]] = x
        return new


def _scattered(slots: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Ranks by slot."""
    out = torch.empty_like(ranks)
    out[slots] = ranks
    return out


def _reduced(columns: torch.Tensor, reduction: str) -> torch.Tensor:
    """Over the heads, last dimension but one."""
    if reduction == "max":
        return columns.amax(-2)
    return columns.mean(-2) if reduction == "mean" else columns.median(-2).values
