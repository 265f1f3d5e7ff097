"""The large linear layers of a model, computed by `kvrag_kernels.linear` while a pass of few tokens runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from kvrag_kernels.linear import has_both, is_few, is_large, linear

_FORWARD = "forward"


class Linears:
    """Lends layers another forward for the time of a pass; between passes the model is as it was."""

    def __init__(self, network: nn.Module) -> None:
        """Find them; those that somebody else has changed are left alone."""
        self._forwards: dict[nn.Linear, Callable[[torch.Tensor], torch.Tensor]] = {}
        for layer in network.modules() if has_both() else ():
            if type(layer) is nn.Linear and is_large(layer.weight):
                self._forwards[layer] = partial(_forward, layer)

    @contextmanager
    def lent(self, num_tokens: int) -> Iterator[None]:
        """For a pass of so many tokens."""
        taken = []
        if is_few(num_tokens):
            for layer, forward in self._forwards.items():
                if _FORWARD not in layer.__dict__:
                    layer.__dict__[_FORWARD] = forward
                    taken.append(layer)
        try:
            yield
        finally:
            for layer in taken:
                if layer.__dict__.get(_FORWARD) is self._forwards[layer]:
                    del layer.__dict__[_FORWARD]


def _forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)
