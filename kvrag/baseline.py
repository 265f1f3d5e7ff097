"""Ordinary prefill by transformers' own `generate`: what cached answers are compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvrag.config import Sampling
from kvrag.decode import configuration
from kvrag.model import Model


@dataclass(frozen=True, slots=True)
class OrdinaryAnswer:
    """An answer of `generate`.

    Attributes:
        text: without special tokens.
        tokens: the new ones.
        first_token: seconds until the first token was chosen.
        decode: seconds for the tokens after the first.
    """

    text: str
    tokens: tuple[int, ...]
    first_token: float
    decode: float


class _Watch:
    """A streamer that notes when tokens arrive; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def ordinary_answer(model: Model, prompt: Sequence[int], sampling: Sampling | None = None) -> OrdinaryAnswer:
    """Read the whole prompt and answer it, greedily unless `sampling` says otherwise.

    Args:
        model: its attention without a reading is stock SDPA.
        prompt: tokens.
        sampling: stop strings are not looked for.
    """
    settings = configuration(model.network, sampling or Sampling())
    settings.use_cache = True
    ids = torch.tensor([list(prompt)], device=model.device)
    generate: Any = model.network.generate  # of a mixin that the base class does not name
    watch, start = _Watch(), time.perf_counter()
    out = generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids), streamer=watch)
    new = tuple(out[0, len(prompt) :].tolist())
    first = watch.times[1] - start
    return OrdinaryAnswer(model.text.decode(new), new, first, watch.times[-1] - watch.times[1])
