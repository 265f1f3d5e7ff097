"""Finds the layers whose attention is worth counting, on a sample that the benchmark never asks about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from quality_parts.asking import ROOM, VARIANTS, Bench, unit_scores
from quality_parts.contexts import draw
from quality_parts.policies import Scores

from kvrag.focus.placement import Placement
from kvrag.focus.policy import Policy
from kvrag.focus.pruning import AttentionScore
from kvrag.looking import look


def calibrate(bench: Bench, documents: Sequence[int], turns: int) -> dict[str, Any]:
    """Precision@1 of every way of scoring, for single layers and for pairs, under plain re-positioning.

    Args:
        bench: the model.
        documents: numbers of documents.
        turns: questions of each kind and number.
    """
    policy = Policy(placement=Placement(window=bench.window))
    sample: list[tuple[torch.Tensor, frozenset[int]]] = []
    for num in documents:
        for turn in range(turns):
            for context in draw("calibration", num, turn):
                opened = bench.open(context)
                for asked in context.asked:
                    arrangement = opened.arrangement(asked.question.text)
                    looked = look(bench.model, arrangement, policy, max_new_tokens=ROOM)
                    sample.append((unit_scores(looked), asked.gold))
    layers = range(bench.model.num_layers)
    sets = [*((i,) for i in layers), *combinations(layers, 2)]
    table = [
        [variant, list(chosen), round(_share(sample, number, chosen), 4)]
        for number, variant in enumerate(VARIANTS)
        for chosen in sets
    ]
    return {"documents": list(documents), "asked": len(sample), "precision": table}


def _share(
    sample: Sequence[tuple[torch.Tensor, frozenset[int]]], variant: int, layers: Sequence[int]
) -> float:
    hits = [int(scores[variant, list(layers)].sum(0).argmax()) in gold for scores, gold in sample]
    return sum(hits) / max(1, len(hits))


def chosen(found: dict[str, Any], num_layers: int, given: Sequence[int] | None = None) -> Scores:
    """The best single layer and pair that leave a layer to prune before, and the best layers for repair.

    Args:
        found: from `calibrate`.
        num_layers: of the model.
        given: layers to use instead, by their mass over the question.
    """
    if given:
        score = AttentionScore(tuple(given))
        return Scores(score, score, tuple(given))
    early = [row for row in found["precision"] if max(row[1]) < num_layers - 1]
    # The first of equals: fewer layers, and plain mass before squared.
    single = max((row for row in early if len(row[1]) == 1), key=lambda row: row[2])
    pair = max((row for row in early if len(row[1]) == 2), key=lambda row: row[2], default=single)
    columns = max((row for row in found["precision"] if row[0] in VARIANTS[:2]), key=lambda row: row[2])
    return Scores(_score(single), _score(pair), tuple(columns[1]), _score(columns).rows)


def _score(row: Sequence[Any]) -> AttentionScore:
    variant, layers, _ = row
    rows = "last" if variant.endswith("last row") else "question"
    return AttentionScore(tuple(layers), rows, variant.startswith("squared"))


def described(scores: Scores) -> dict[str, Any]:
    """The choice in words, for the report."""
    return {
        "best layer": _words(scores.single),
        "best pair": _words(scores.pair),
        "best layers for repair": f"{_named(scores.columns)}, rows looked at by {_LOOKED[scores.looked_by]}",
    }


def _words(score: AttentionScore) -> str:
    what = "squared mass" if score.squared else "mass"
    return f"{_named(score.layers or ())}, {what} over {_LOOKED[score.rows]}"


_LOOKED = {"question": "the question", "last": "its last row"}


def _named(layers: Sequence[int]) -> str:
    return f"{'layers' if len(layers) > 1 else 'layer'} {' and '.join(map(str, layers))} (from 0)"
