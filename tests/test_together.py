"""Chunks of one source share their fate: while the question is read, in heats, and in a second look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.answer import Answer
from kvrag.compose import Arrangement, Unit
from kvrag.config import Sampling
from kvrag.encoding import encode
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.focus.heats import Heats
from kvrag.focus.placement import Placement
from kvrag.focus.policy import Policy, SecondLook, cachefocus
from kvrag.focus.pruning import AttentionScore, GivenScore, Pruning
from kvrag.focus.together import Together, groups_of, scores_of
from kvrag.heats import rounds
from kvrag.looking import look
from kvrag.model import Model
from kvrag.testing.models import tiny

TEXTS = [f"Part {i} says that the mill of {town} is old." for i, town in enumerate("ABCDEFGH")]
SOURCES = ("a", "a", "b", "c", "b", None, None, "c")
GROUPS = {0: {0, 1}, 2: {2, 4}, 3: {3, 7}, 5: {5}, 6: {6}}
SCORES = (1.0, 5.0, 4.0, 2.0, 4.0, 4.5, 0.0, 2.5)


@cache
def model() -> Model:
    return tiny("llama")


@cache
def arrangement() -> Arrangement:
    text = model().text
    (prefix,) = encode(model(), [text.tokenize("Read.", first=True)])
    units, at = [], prefix.num_tokens
    for i, kv in enumerate(encode(model(), [text.tokenize(t) for t in TEXTS], prefix)):
        units.append(Unit(i, kv, at, source=SOURCES[i]))
        at += units[-1].length
    return Arrangement(prefix, (), tuple(units), text.tokenize("\n\nWhat is old?"), at)


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), max_size=12))
def test_every_chunk_is_in_one_group_with_those_of_its_source(sources: list[str | None]) -> None:
    groups = groups_of(sources, "sum")
    assert sorted(i for group in groups for i in group) == list(range(len(sources)))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert group == sorted(group)
        assert len({sources[i] for i in group}) == 1
        assert len(group) == (sources.count(sources[group[0]]) if sources[group[0]] else 1)
    alone = groups_of(sources, None)
    assert alone == [[i] for i in range(len(sources))]
    scores = [i / 7 for i in range(len(sources))]
    assert scores_of(scores, alone, None) == scores


@pytest.mark.parametrize(
    ("together", "keep", "kept"),
    [
        ("sum", 2, (0, 1, 2, 4)),  # 8.0 and 6.0
        ("max", 2, (0, 1, 5)),  # 5.0 and 4.5
        ("sum", 1, (2, 4)),
        ("max", 0.6, (0, 1, 2, 4, 5)),  # of five sources three
        (None, 3, (1, 2, 5)),
    ],
)
def test_the_best_sources_stay_whole(
    together: Together | None, keep: int | float, kept: tuple[int, ...]
) -> None:
    pruning = Pruning(keep=keep, start=1, scorer=GivenScore(SCORES), together=together)
    looked = look(model(), arrangement(), Policy(placement=Placement(order="sort"), pruning=pruning))
    assert looked.focus.kept == kept
    for group in GROUPS.values() if together else ():
        assert len({looked.focus.dropped_at.get(number) for number in group}) == 1
    places = {s.document: s.target for s in looked.tables if s.document is not None}
    if together == "sum" and keep == 2:  # the best source next to the question, its chunks in their order
        assert sorted(places, key=places.__getitem__) == [0, 1, 2, 4]


def test_chunks_without_a_source_are_pruned_as_ever() -> None:
    unknown = arrangement()
    unknown = replace(unknown, units=tuple(replace(u, source=None) for u in unknown.units))
    alone, together = (
        look(model(), unknown, Policy(pruning=Pruning(keep=3, start=1, together=how)))
        for how in (None, "sum")
    )
    assert torch.equal(alone.read.logits, together.read.logits)
    assert alone.focus.dropped_at == together.focus.dropped_at


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_source_stands_in_one_heat_and_wins_or_loses_as_a_whole(keep: int) -> None:
    pruning = Pruning(keep=keep, start=2, scorer=AttentionScore((1,)), together="max", heats=Heats(size=0.9))
    capacity = 3 * max(unit.length for unit in arrangement().units) + 5
    found = rounds(model(), arrangement(), Policy(pruning=pruning), capacity)
    assert found.heats
    left = {unit.number for unit in found.arrangement.units}
    for group in GROUPS.values():
        assert group <= left or not group & left
        for heats in found.heats:
            assert sum(bool(group & set(heat)) for heat in heats) <= 1


def test_an_unknown_way_to_join_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"together='mean'.*sum, max"):
        Pruning(together="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="together"):
        SecondLook(together="mean")  # type: ignore[arg-type]


def ask(engine: Engine, policy: Policy, sources: Mapping[str, str] | None) -> Answer:
    stream = engine.stream_rendered(
        "\n\n".join(["Read.", *TEXTS, "What is old?"]),
        TEXTS,
        prefix="Read.\n\n",
        sampling=Sampling(max_new_tokens=6, ignore_eos=True),
        policy=policy,
        sources=sources,
        is_rendered=False,
    )
    for _ in stream:
        pass
    assert stream.answer is not None
    return stream.answer


def test_an_engine_is_told_what_belongs_together(tmp_path: Path) -> None:
    sources = {str(i): source for i, source in enumerate(SOURCES) if source}
    best = GivenScore(SCORES)
    pruned = cachefocus(1, together="sum")
    assert pruned.pruning is not None
    pruned = replace(pruned, pruning=replace(pruned.pruning, scorer=best))
    second = Policy(second_look=SecondLook(after=2, keep=2, scorer=best, together="sum"))
    with Engine(model(), tmp_path / "store") as engine:
        for policy, read, alone in ((pruned, {2, 4}, {1}), (second, {0, 1, 2, 4}, {1, 5})):
            answer = ask(engine, policy, sources)
            assert {int(u.key) for u in answer.documents if u.is_read} == read
            answer = ask(engine, policy, None)
            assert {int(u.key) for u in answer.documents if u.is_read} == alone
