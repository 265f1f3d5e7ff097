"""Which documents are dropped, and before which layers, while the question is read (CacheFocus, sec. 3).

Lee, Park, Han, Na, "CacheFocus: Dynamic Cache Re-Positioning for Efficient Retrieval-Augmented Generation",
arXiv:2502.11101. The unit is a whole document, never a token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from kvrag.errors import ConfigError


class Scorer(Protocol):
    """Scores documents while the layers are read."""

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """What a layer adds to the documents' running scores; higher is better.

        Args:
            layer: number of the layer that has just attended.
            mass: [N, T], float32: attention mass of each document per row of the question, mean over heads.
            focus: [N, T], float32: the same for squared masses.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionScore:
    """Mean attention mass over heads and rows of the question, summed over layers (CacheFocus, sec. 3).

    Attributes:
        layers: layers that count; None: all. Which ones are worth counting differs from model to model.
        rows: "question": the mean over all its rows; "last": the row that chooses the first token.
        squared: count squared masses: heads that look at one document count, heads that look everywhere
            hardly do.
    """

    layers: tuple[int, ...] | None = None
    rows: Literal["question", "last"] = "question"
    squared: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown rows."""
        if self.rows not in ("question", "last"):
            raise ConfigError(f"rows={self.rows!r}: expected 'question' or 'last'")

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """See `Scorer`."""
        seen = focus if self.squared else mass
        if self.layers is not None and layer not in self.layers:
            return [0.0] * len(seen)
        found: list[float] = (seen.mean(-1) if self.rows == "question" else seen[:, -1]).tolist()
        return found


@dataclass(frozen=True, slots=True)
class RankScore:
    """The retriever's order: the first document is the best. A control: it needs no attention."""

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """See `Scorer`."""
        return [float(-i) for i in range(len(mass))]


@dataclass(frozen=True, slots=True)
class RandomScore:
    """Chance. A control: what attention finds has to beat it.

    Attributes:
        seed: the same seed drops the same documents of a prompt with as many.
    """

    seed: int = 0

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """See `Scorer`."""
        order = list(range(len(mass)))
        random.Random(self.seed).shuffle(order)
        return [float(i) for i in order]


@dataclass(frozen=True, slots=True)
class GivenScore:
    """Scores known beforehand: a reranker's, or the truth as a control.

    Attributes:
        scores: one per document, in retrieval order.
    """

    scores: tuple[float, ...]

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """See `Scorer`."""
        if len(self.scores) != len(mass):
            raise ConfigError(f"{len(self.scores)} scores were given for {len(mass)} documents")
        return self.scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """A schedule: how many documents are left from which layer on.

    Attributes:
        keep: documents left at the end: a number, or a share of them (rounded up, at least one).
        start: first layer before which documents are dropped; None: a quarter of the layers, at least 1.
        every: layers from one prune to the next.
        drop: documents dropped at once; None: as many as reach `keep` in the last prune.
        below: drop what scores below this share of the best score instead, never fewer left than `keep`.
        scorer: what decides; the lowest running score goes first, at equal scores the later document.
    """

    keep: int | float = 0.5
    start: int | None = None
    every: int = 1
    drop: int | None = None
    below: float | None = None
    scorer: Scorer = field(default_factory=AttentionScore)

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: expected a share above 0 up to 1, or a number of documents")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ConfigError(f"keep={self.keep}: expected at least 1 document")
        if self.every < 1 or (self.drop is not None and self.drop < 1):
            raise ConfigError(f"every={self.every}, drop={self.drop}: expected at least 1")
        if self.start is not None and self.start < 1:
            raise ConfigError(f"start={self.start}: the first layer has to attend before there are scores")
        if self.below is not None and not 0 < self.below <= 1:
            raise ConfigError(f"below={self.below}: expected a share of the best score, above 0 up to 1")

    def num_kept(self, num_documents: int) -> int:
        """Documents left at the end."""
        kept = math.ceil(self.keep * num_documents) if isinstance(self.keep, float) else self.keep
        return min(num_documents, max(1, kept))

    def prunes_before(self, layer: int, num_layers: int) -> bool:
        """Whether documents may be dropped before layer `layer`."""
        start = self._start(num_layers)
        return start <= layer < num_layers and (layer - start) % self.every == 0

    def dropped(
        self, layer: int, num_layers: int, survivors: Sequence[int], scores: Sequence[float], total: int
    ) -> list[int]:
        """Documents that go before layer `layer`.

        Args:
            layer: about to attend.
            num_layers: of the model.
            survivors: documents so far, ascending.
            scores: running score of every document, by number.
            total: documents at the beginning.
        """
        if not self.prunes_before(layer, num_layers):
            return []
        keep = self.num_kept(total)
        surplus = len(survivors) - keep
        if surplus <= 0:
            return []
        worst_first = sorted(survivors, key=lambda i: (scores[i], -i))
        if self.below is not None:
            border = self.below * max(scores[i] for i in survivors)
            return [i for i in worst_first[:surplus] if scores[i] < border]
        prunes_left = len(range(layer, num_layers, self.every))
        return worst_first[: min(surplus, self.drop or math.ceil(surplus / prunes_left))]

    def _start(self, num_layers: int) -> int:
        return max(1, num_layers // 4) if self.start is None else self.start
