"""Which layers' attention finds the document that answers a question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch

from kvrag.focus.policy import PLAIN
from kvrag.focus.pruning import AttentionScore, Pruning
from kvrag.looking import look
from kvrag.model import Model
from kvrag.trial.prompts import Prepared

_SIGNIFICANT = 0.01

Rows = Literal["question", "last"]
Masses = Sequence[tuple[torch.Tensor, int]]
"""For each question [L, N], the attention mass of each document in each layer, and the gold document."""


@dataclass(frozen=True, slots=True)
class LayerScores:
    """How often the document with the most attention is the one that answers (precision@1).

    Attributes:
        questions: how many were asked.
        chance: how often blind choice is right.
        question: for each layer, how often the attention of all the question's rows is right.
        last: for each layer, how often that of the last row is, which chooses the first token.
        best: layers whose attention, summed, is right most often, out of those that pruning can use, which is
            all but the last; empty if none is better than chance.
        best_rows: which rows' attention that is.
        best_precision: how often it is right; 0 if there is none.
    """

    questions: int
    chance: float
    question: tuple[float, ...]
    last: tuple[float, ...]
    best: tuple[int, ...]
    best_rows: Rows
    best_precision: float

    @property
    def pruning(self) -> Pruning | None:
        """Pruning by the best layers; None if there are none."""
        if not self.best:
            return None
        # Layers that have not attended yet cannot be asked: pruning begins behind the last of them.
        return Pruning(start=max(self.best) + 1, scorer=AttentionScore(self.best, rows=self.best_rows))


def layer_scores(model: Model, prepared: Iterable[Prepared]) -> LayerScores | None:
    """Ask, and look at what each layer looks at; None without questions."""
    question: list[tuple[torch.Tensor, int]] = []
    last: list[tuple[torch.Tensor, int]] = []
    for one in prepared:
        found = look(model, one.arrangement, PLAIN)
        documents = [i for i, s in enumerate(found.composed.table) if s.document is not None]
        mass = found.read.mass[:, documents, found.composed.question :].cpu()
        question.append((mass.mean(-1), one.gold))
        last.append((mass[..., -1], one.gold))
    return scored(question, last) if question else None


def scored(question: Masses, last: Masses) -> LayerScores:
    """Count hits; choose a layer or a pair of layers.

    Args:
        question: masses over all the question's rows.
        last: the same over the last row.
    """
    num = len(question)
    chance = sum(1 / mass.shape[1] for mass, _ in question) / num
    counts: dict[Rows, list[list[int]]] = {"question": _hits(question), "last": _hits(last)}
    usable = range(len(counts["last"]) - 1)
    best, rows, most = _best(counts, usable, num)
    # Better than chance: blind choice would seldom be right as often, even the luckiest of all these.
    tried = 2 * (len(usable) + math.comb(len(usable), 2))
    if not best or _luck(most, num, chance) * tried >= _SIGNIFICANT:
        best, rows, most = (), "question", 0
    whole, end = (tuple(h[i][i] / num for i in range(len(h))) for h in counts.values())
    return LayerScores(num, chance, whole, end, best, rows, most / num)


def _hits(masses: Masses) -> list[list[int]]:
    """[L, L]: how often every pair of layers is right; a layer by itself on the diagonal."""
    right = [(mass[:, None] + mass[None]).argmax(-1) == gold for mass, gold in masses]
    hits: list[list[int]] = torch.stack(right).sum(0).tolist()
    return hits


def _best(
    counts: Mapping[Rows, list[list[int]]], usable: range, num: int
) -> tuple[tuple[int, ...], Rows, int]:
    """The layers and rows that are right most often, and how often.

    A pair has to beat the best single layer by more than its standard error: with many pairs, some are lucky.
    """
    singles = [(hits[i][i], (i,), rows) for rows, hits in counts.items() for i in usable]
    pairs = [(hits[i][j], (i, j), rows) for rows, hits in counts.items() for i, j in combinations(usable, 2)]
    if not singles:
        return (), "question", 0
    most, layer, rows = max(singles, key=lambda found: found[0])
    if pairs:
        together, pair, seen_by = max(pairs, key=lambda found: found[0])
        if together - most > math.sqrt(most * (num - most) / num):
            return pair, seen_by, together
    return layer, rows, most


def _luck(hits: int, num: int, chance: float) -> float:
    """How probable at least so many hits are by chance alone."""
    return sum(math.comb(num, k) * chance**k * (1 - chance) ** (num - k) for k in range(hits, num + 1))
