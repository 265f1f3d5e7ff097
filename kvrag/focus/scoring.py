"""What decides which documents stay while a question is read: attention, or a control."""

from __future__ import annotations

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

    def among(self, documents: Sequence[int]) -> GivenScore:
        """The scores of some of the documents."""
        if max(documents, default=-1) >= len(self.scores):
            raise ConfigError(f"{len(self.scores)} scores were given for more documents")
        return GivenScore(tuple(self.scores[number] for number in documents))


@dataclass(frozen=True, slots=True)
class NearScore:
    """Attention times the similarity that the retriever saw, as a share of the greatest, to a power.

    A search by words or vectors and a model's attention are misled by different look-alikes: what both find
    is the right document more often than what either finds alone. Not in the papers; docs/policies.md says
    what it brings.

    Attributes:
        similarities: of each document to the question, in retrieval order; what is below 0 counts as 0.
        power: how much the search counts; 0: attention alone.
        scorer: whose attention.
    """

    similarities: tuple[float, ...]
    power: float = 4.0
    scorer: Scorer = field(default_factory=AttentionScore)

    def __post_init__(self) -> None:
        """Refuse a power without a meaning."""
        if not self.power >= 0:
            raise ConfigError(f"power={self.power}: expected 0 or more")

    def score(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> Sequence[float]:
        """See `Scorer`."""
        if len(self.similarities) != len(mass):
            raise ConfigError(f"{len(self.similarities)} similarities for {len(mass)} documents")
        return weighed(self.scorer.score(layer, mass, focus), self.similarities, self.power)

    def among(self, documents: Sequence[int]) -> NearScore:
        """The same for some of the documents."""
        if max(documents, default=-1) >= len(self.similarities):
            raise ConfigError(f"{len(self.similarities)} similarities for more documents")
        near = tuple(self.similarities[number] for number in documents)
        return NearScore(near, self.power, among(self.scorer, documents))


def weighed(scores: Sequence[float], similarities: Sequence[float], power: float) -> list[float]:
    """Scores times similarities, these as shares of the greatest one, to a power; 1 if none is above 0.

    Raises:
        ConfigError: a score is below 0, which a small weight would raise.

    >>> weighed([1.0, 2.0, 3.0], [0.8, 0.4, -0.1], 2.0)
    [1.0, 0.5, 0.0]
    """
    if min(scores, default=0.0) < 0:
        raise ConfigError(
            "scores below 0 cannot be weighed by similarities; take an AttentionScore, or nearness 0"
        )
    near = [max(0.0, similarity) for similarity in similarities]
    most = max(near, default=0.0)
    weights = [(one / most) ** power if most else 1.0 for one in near]
    return [score * weight for score, weight in zip(scores, weights, strict=True)]


def among(scorer: Scorer, documents: Sequence[int]) -> Scorer:
    """A scorer for some of a prompt's documents, by number."""
    return scorer.among(documents) if isinstance(scorer, GivenScore | NearScore) else scorer


def depth_of(scorer: Scorer) -> int | None:
    """Layers behind which nothing is added to scores that could change their order; None: not known."""
    if isinstance(scorer, NearScore):
        return depth_of(scorer.scorer)
    if isinstance(scorer, AttentionScore):
        return None if scorer.layers is None else max(scorer.layers, default=0) + 1
    return 1 if isinstance(scorer, RankScore | RandomScore | GivenScore) else None
