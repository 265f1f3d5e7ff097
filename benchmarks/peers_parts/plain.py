"""transformers by itself: `generate`, from nothing or from the cache of an earlier prompt's beginning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peers_parts.asked import Clock, Took, common
from transformers import DynamicCache, GenerationConfig

from kvrag import backbone


@contextmanager
def stock_attention(network: Any) -> Iterator[None]:
    """The network as transformers runs it, for as long as it is asked to."""
    network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(backbone.NAME)


def filled(config: Any, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds these keys and values without copying them: appending makes new tensors anyway.

    Args:
        config: of the model.
        rows: keys and values of every layer, [1, K, T, D].
    """
    cache = DynamicCache(config=config)
    for layer, (keys, values) in zip(cache.layers, rows, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


class _Watch:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.count = clock, -1

    def put(self, value: Any) -> None:
        self.count += 1
        if self.count == 1:
            self._clock.first()
        else:
            self._clock.last()

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def generated(
    network: Any, prompt: Sequence[int], cache: DynamicCache, new_tokens: int, clock: Clock
) -> Took:
    """Let `generate` answer; it reads what the cache does not hold, and extends the cache.

    Args:
        network: with its stock attention.
        prompt: all tokens.
        cache: of the prompt's beginning.
        new_tokens: greedy, without an end.
        clock: running.
    """
    reused = cache.get_seq_length()
    ids = torch.tensor([list(prompt)])
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    watch = _Watch(clock)
    out = network.generate(
        ids,
        generation_config=settings,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=watch,
    )
    return clock.took(watch.count - 1, reused, int(out[0, len(prompt)]))


class Plain:
    """Answers by `generate`, and keeps the cache of every prompt: the longest common beginning is reused."""

    def __init__(self, network: Any) -> None:
        """Keep nothing yet."""
        self._network = network
        self._kept: list[tuple[list[int], DynamicCache]] = []

    def forget(self) -> None:
        """As after a start."""
        self._kept.clear()

    def ask(self, prompt: list[int], new_tokens: int) -> Took:
        """Answer, and keep."""
        with stock_attention(self._network):
            clock = Clock()
            cache = self._beginning(prompt)
            took = generated(self._network, prompt, cache, new_tokens, clock)
        self._kept.append((prompt, cache))
        return took

    def _beginning(self, prompt: list[int]) -> DynamicCache:
        config = self._network.config
        lengths = [common(tokens, prompt) for tokens, _ in self._kept]
        length = min(max(lengths, default=0), len(prompt) - 1)  # one token has to be read for its logits
        if not length:
            return DynamicCache(config=config)
        layers = self._kept[lengths.index(max(lengths))][1].layers
        return filled(config, [(x.keys[:, :, :length], x.values[:, :, :length]) for x in layers])
