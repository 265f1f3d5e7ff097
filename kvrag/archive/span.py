"""A span of a chat: some sentences of it, with the rows that the model has of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import KV, LayerKV
from kvrag.store.key import token_bytes

RawRows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys, not rotated, and values of each layer, [K, T, D] and [K, T, Dv]."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a chat, and what stands before it.

    Attributes:
        position: tokens of the chat before it, as the memory counts them.
        turn: number of the turn in which it was read.
        context: 64 hex digits that stand for everything before it.
    """

    position: int = 0
    turn: int = 0
    context: str = ""

    def behind(self, tokens: Sequence[int]) -> Mark:
        """The place behind these tokens."""
        said = hashlib.blake2b(bytes.fromhex(self.context) + token_bytes(tuple(tokens)), digest_size=32)
        return Mark(self.position + len(tokens), self.turn, said.hexdigest())


@dataclass(frozen=True, slots=True)
class Span:
    """Some sentences of a chat, read.

    Attributes:
        at: where it begins, and what stands before it.
        role: who says its first token: "user", "assistant", ...
        text: what it says, without the template's signs.
        kv: its rows as they were read in the chat, keys rotated at local positions 0..n-1.
        cost_seconds: what reading it took; 0: unknown.
    """

    at: Mark
    role: str
    text: str
    kv: KV
    cost_seconds: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its tokens, with those of the template."""
        return self.kv.tokens

    @property
    def end(self) -> int:
        """Tokens of the chat up to its end."""
        return self.at.position + self.kv.num_tokens


def local_rows(tokens: Sequence[int], rows: RawRows, specs: Sequence[LayerSpec]) -> KV:
    """Rows as entries of the store have them, in memory of their own.

    Args:
        tokens: T of them.
        rows: of each layer; not modified. Keys are rotated once, in float32, at positions 0..T-1.
        specs: each layer's rotation.
    """
    places = torch.arange(len(tokens), device=rows[0][0].device)
    turns = {spec: spec.rotation.turn(places) if spec.rotation else None for spec in dict.fromkeys(specs)}
    layers = []
    for spec, (keys, values) in zip(specs, rows, strict=True):
        turned = rotate(keys[None], turns[spec])[0]
        layers.append(LayerKV(_own(turned), _own(values)))
    return KV(tuple(tokens), tuple(layers))


def _own(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format)
