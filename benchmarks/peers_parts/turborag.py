"""TurboRAG (Lu et al. 2024, arXiv:2410.07590) in plain transformers: torch.save, joined, re-positioned.

The paper's reordered positions: keys of every document are turned to where it stands in the prompt. What
the paper leaves open is done in the way that costs least: a document is one tensor in one file, keys are
turned by one angle per document and written where they are wanted, so that every row is copied once.
(Its published code keeps keys without positions and turns all of them again for every token.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers_parts.asked import Clock, Pool, Request, Took
from peers_parts.plain import filled, generated, stock_attention

from kvrag.segments import KV


class TurboRag:
    """Documents' caches as files, and answers from them."""

    def __init__(self, network: Any, folder: Path, pool: Pool) -> None:
        """Use a folder that is there."""
        self._network, self._folder, self._pool = network, folder, pool

    def save(self, number: int, kv: KV) -> None:
        """Write a document that was read alone, keys rotated from position 0 on."""
        layers = [torch.stack([layer.keys, layer.values]) for layer in kv.layers]
        torch.save(torch.stack(layers), self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.pt"

    @torch.inference_mode()
    def alone(self, number: int) -> torch.Tensor:
        """The rows of a document by transformers itself, as `save` writes them: [L, 2, K, T, D]."""
        with stock_attention(self._network):
            cache = self._network(
                torch.tensor([self._pool.documents[number]]), use_cache=True
            ).past_key_values
        return torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])

    def load(self, number: int) -> torch.Tensor:
        """The rows of a file."""
        loaded: torch.Tensor = torch.load(self._path(number), weights_only=True)
        return loaded

    @torch.inference_mode()
    def joined(self, documents: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every layer, documents one behind the other, [1, K, T, D]."""
        length = self._pool.document_tokens
        made: torch.Tensor | None = None
        for place, number in enumerate(documents):
            rows = self.load(number)
            if made is None:
                num_layers, _, heads, _, dim = rows.shape
                made = rows.new_empty((num_layers, 2, heads, length * len(documents), dim))
            at = slice(place * length, (place + 1) * length)
            made[:, 1, :, at] = rows[:, 1]
            self._turn(rows[:, 0], place * length, made[:, 0, :, at])
        assert made is not None
        return [(layer[0][None], layer[1][None]) for layer in made]

    def _turn(self, keys: torch.Tensor, by: int, into: torch.Tensor) -> None:
        """Write keys turned by a number of positions (RoPE, half-split layout as in Llama)."""
        if by == 0:
            into.copy_(keys)
            return
        angles = self._network.model.rotary_emb.inv_freq.double() * by
        cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
        half = keys.shape[-1] // 2
        a, b = keys[..., :half], keys[..., half:]
        torch.mul(a, cos, out=into[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=into[..., half:]).addcmul_(a, sin)

    def ask(self, request: Request, new_tokens: int) -> Took:
        """Load, join, read the question, choose tokens."""
        prompt = self._pool.prompt(request)
        with stock_attention(self._network):
            clock = Clock()
            cache = filled(self._network.config, self.joined(request.documents))
            return generated(self._network, prompt, cache, new_tokens, clock)

    @torch.inference_mode()
    def logits(self, request: Request) -> torch.Tensor:
        """Of the question's last token."""
        with stock_attention(self._network):
            cache = filled(self._network.config, self.joined(request.documents))
            ids = torch.tensor([list(request.question)])
            found: torch.Tensor = self._network(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return found
