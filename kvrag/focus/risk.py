"""How far an answer from composed caches may be from the one that full attention would have given.

Signals that cost nothing: they come from what the question's last row looked at and what it would say next.
How well each tells answers that differ from those that agree is measured in `benchmarks/quality.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Risk:
    """Signals of one answer, each from 0 (no sign of trouble) to 1.

    Attributes:
        entropy: of the documents' shares of squared attention, relative to its largest value: evidence that
            is spread over documents which never saw each other.
        others: share of the documents' attention that goes to other documents than the best.
        doubt: 1 - probability of the first token.
    """

    entropy: float
    others: float
    doubt: float

    @property
    def value(self) -> float:
        """The signal that `Policy.max_risk` is compared with."""
        return self.doubt


def risk(focus: Sequence[float], logits: torch.Tensor) -> Risk:
    """Signals from one reading of a question.

    Args:
        focus: squared attention to each document.
        logits: [V], of the first token.
    """
    doubt = 1 - float(logits.float().softmax(-1).max())
    total = sum(focus)
    if len(focus) < 2 or total <= 0:
        return Risk(0.0, 0.0, doubt)
    shares = [f / total for f in focus]
    entropy = -sum(s * math.log(s) for s in shares if s > 0) / math.log(len(shares))
    return Risk(entropy, 1 - max(shares), doubt)
