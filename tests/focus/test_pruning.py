"""Schedules: who goes when."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.focus.policy import SecondLook
from kvrag.focus.pruning import AttentionScore, GivenScore, NearScore, Pruning, RandomScore, RankScore, Scorer
from kvrag.focus.scoring import depth_of


def survivors_by_layer(pruning: Pruning, num_layers: int, scores: list[float]) -> list[list[int]]:
    """Who is read by each layer, with scores that do not change."""
    left, found = list(range(len(scores))), []
    for layer in range(num_layers):
        gone = pruning.dropped(layer, num_layers, left, scores, len(scores))
        left = [i for i in left if i not in gone]
        found.append(left)
    return found


def test_one_document_goes_at_each_pruning_layer_as_in_the_papers_figure() -> None:
    found = survivors_by_layer(Pruning(keep=1, start=1, every=1, drop=1), 5, [0.3, 0.1, 0.4, 0.2])
    assert found == [[0, 1, 2, 3], [0, 2, 3], [0, 2], [2], [2]]


@pytest.mark.parametrize(
    ("pruning", "sizes"),
    [
        (Pruning(keep=0.5), [8, 8, 7, 6, 5, 4, 4, 4]),  # a quarter of the layers first, then one by one
        (Pruning(keep=2, start=4, every=2), [8, 8, 8, 8, 5, 5, 2, 2]),
        (Pruning(keep=1, start=7), [8] * 7 + [1]),
        (Pruning(keep=1, start=8), [8] * 8),  # behind the last layer: never
        (Pruning(keep=3, start=1, drop=2), [8, 6, 4, 3, 3, 3, 3, 3]),
        (Pruning(keep=20), [8] * 8),
    ],
)
def test_schedules(pruning: Pruning, sizes: list[int]) -> None:
    assert [len(x) for x in survivors_by_layer(pruning, 8, [float(i) for i in range(8)])] == sizes


def test_below_a_share_of_the_best_score() -> None:
    scores = [0.1, 1.0, 0.6, 0.45]
    assert survivors_by_layer(Pruning(keep=1, start=1, below=0.5), 3, scores)[-1] == [1, 2]
    assert survivors_by_layer(Pruning(keep=3, start=1, below=1.0), 3, scores)[-1] == [1, 2, 3]


def test_of_equal_scores_the_later_document_goes_first() -> None:
    assert survivors_by_layer(Pruning(keep=2, start=1), 2, [0.5] * 4)[-1] == [0, 1]


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
)
def test_as_many_as_asked_are_left_and_they_are_the_best(
    keep: int, num_layers: int, every: int, scores: list[float]
) -> None:
    pruning = Pruning(keep=keep, start=1, every=every)
    left = survivors_by_layer(pruning, num_layers, scores)
    if num_layers > 1:
        assert len(left[-1]) == min(keep, len(scores))
        worst = min(scores[i] for i in left[-1])
        assert all(scores[i] <= worst for i in set(range(len(scores))) - set(left[-1]))
    for before, after in pairwise(left):
        assert set(after) <= set(before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0},
        {"keep": 0.0},
        {"keep": 1.5},
        {"every": 0},
        {"drop": 0},
        {"start": 0},
        {"below": 0.0},
        {"below": 2.0},
        {"nearness": -1.0},
        {"nearness": float("nan")},
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Pruning(**wrong)  # type: ignore[arg-type]


def test_scores() -> None:
    mass = torch.tensor([[0.2, 0.4], [0.1, 0.7]])
    focus = mass.square()
    assert AttentionScore().score(0, mass, focus) == pytest.approx([0.3, 0.4])
    assert AttentionScore(rows="last").score(0, mass, focus) == pytest.approx([0.4, 0.7])
    assert AttentionScore(squared=True).score(0, mass, focus) == pytest.approx([0.1, 0.25])
    assert AttentionScore(layers=(1, 2)).score(0, mass, focus) == [0, 0]
    assert list(RankScore().score(0, mass, focus)) == [0, -1]
    assert sorted(RandomScore(1).score(0, mass, focus)) == [0, 1]
    assert RandomScore(1).score(0, mass, focus) == RandomScore(1).score(3, mass, focus)
    with pytest.raises(ConfigError, match=r"3 scores.*2 documents"):
        GivenScore((1.0, 2.0, 3.0)).score(0, mass, focus)
    with pytest.raises(ConfigError, match="rows='all'"):
        AttentionScore(rows="all")  # type: ignore[arg-type]


def test_the_search_and_attention_decide_together() -> None:
    mass = torch.tensor([[0.2, 0.4], [0.1, 0.7], [0.3, 0.3]])
    near = NearScore((0.4, 0.8, -0.3), power=2.0)
    assert near.score(0, mass, mass) == pytest.approx([0.3 * 0.25, 0.4, 0.0])
    assert near.among([2, 0]).score(0, mass[[2, 0]], mass[[2, 0]]) == pytest.approx([0.0, 0.3])
    assert NearScore((0.4, 0.8, 0.1), power=0.0).score(0, mass, mass) == AttentionScore().score(0, mass, mass)
    assert NearScore((-1.0, 0.0, -2.0)).score(0, mass, mass) == AttentionScore().score(0, mass, mass)
    with pytest.raises(ConfigError, match="2 similarities for 3 documents"):
        NearScore((0.1, 0.2)).score(0, mass, mass)
    with pytest.raises(ConfigError, match="similarities for more documents"):
        near.among([3])
    with pytest.raises(ConfigError, match="scores below 0 cannot be weighed"):
        NearScore((0.4, 0.8, 0.1), scorer=RankScore()).score(0, mass, mass)
    with pytest.raises(ConfigError, match="power=-1"):
        NearScore((0.1,), power=-1.0)


def test_similarities_are_given_to_a_pruning_that_wants_them() -> None:
    given = GivenScore((1.0, 2.0))
    pruning = Pruning(keep=1, scorer=given, nearness=3.0).nearer([0.5, 0.25])
    assert pruning == Pruning(keep=1, scorer=NearScore((0.5, 0.25), 3.0, given))
    assert Pruning(keep=1, scorer=given).nearer([0.5, 0.25]) == Pruning(keep=1, scorer=given)


@pytest.mark.parametrize(
    ("scorer", "depth"),
    [(AttentionScore((1, 3)), 4), (AttentionScore(), None), (GivenScore((1.0,)), 1), (RankScore(), 1)],
)
def test_a_search_adds_no_depth(scorer: Scorer, depth: int | None) -> None:
    assert depth_of(scorer) == depth_of(NearScore((1.0,), scorer=scorer)) == depth


def test_a_second_look_has_the_same_bounds() -> None:
    for wrong in ({"after": 0}, {"keep": 0}, {"keep": 1.1}):
        with pytest.raises(ConfigError):
            SecondLook(**wrong)  # type: ignore[arg-type]
