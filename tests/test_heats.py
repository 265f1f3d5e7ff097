"""Heats on a whole question: nothing changes where documents fit, and nobody deep is read who lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvrag.answer import Answer
from kvrag.compose import Arrangement, Unit
from kvrag.config import Sampling
from kvrag.encoding import encode
from kvrag.engine import Engine
from kvrag.focus.heats import Heats
from kvrag.focus.placement import Placement
from kvrag.focus.policy import PLAIN, Policy, SecondLook, cachefocus
from kvrag.focus.pruning import AttentionScore, GivenScore, Pruning, RankScore, Scorer
from kvrag.focus.repair import FirstRows, QueryDriven
from kvrag.heats import Rounds, rounds
from kvrag.looking import look
from kvrag.model import Model
from kvrag.room import Room
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny

TOWNS = ("Varn", "Osted", "Lindal", "Mirrow", "Hale", "Torrin", "Esk", "Bram", "Ulvo", "Quist", "Sorre")
DOCUMENTS = [f"The lighthouse of {town} was built in {1800 + 7 * i}." for i, town in enumerate(TOWNS)]
QUESTION = "\n\nWhen was the lighthouse of Hale built?"
WINDOW = 220
BEST = 8
HEATS = Heats()
TRUTH = GivenScore(tuple(1.0 + (i == BEST) - i / 100 for i in range(len(DOCUMENTS))))


@cache
def model() -> Model:
    return tiny("llama")


def arrangement(documents: Sequence[str] = tuple(DOCUMENTS)) -> Arrangement:
    text = model().text
    (prefix,) = encode(model(), [text.tokenize("Read this.", first=True)])
    lead = text.tokenize("\n")
    units, at = [], prefix.num_tokens + len(lead)
    for i, kv in enumerate(encode(model(), [text.tokenize(d) for d in documents], prefix)):
        units.append(Unit(i, kv, at, text.tokenize("\n\n") if i < len(documents) - 1 else ()))
        at += units[-1].length
    return Arrangement(prefix, lead, tuple(units), text.tokenize(QUESTION), at)


def policy(
    keep: int | float = 2,
    *,
    window: int | None = WINDOW,
    scorer: Scorer | None = None,
    heats: Heats | None = HEATS,
    start: int | None = 2,
    layout: str = "contiguous",
) -> Policy:
    scorer = scorer or AttentionScore((1,), "last", squared=True)
    pruning = Pruning(keep=keep, start=start, scorer=scorer, heats=heats)
    return Policy(placement=Placement(layout, "sort", window=window), pruning=pruning)  # type: ignore[arg-type]


def ran(chosen: Policy, arranged: Arrangement) -> Rounds:
    room = Room.of(arranged, chosen.placement, model().max_length, 8)
    return rounds(model(), arranged, chosen, room.capacity)


@pytest.mark.parametrize("layout", ["contiguous", "slots"])
@pytest.mark.parametrize("keep", [1, 2, 0.5, 11])
def test_everybody_stands_in_one_heat_of_each_round_and_those_left_fit(
    keep: int | float, layout: str
) -> None:
    arranged = arrangement()
    chosen = policy(keep, layout=layout)
    found = ran(chosen, arranged)
    entered = [Counter(n for heat in heats for n in heat) for heats in found.heats]
    assert entered[0] == Counter(range(len(DOCUMENTS)))
    assert all(set(heats.values()) == {1} for heats in entered)
    assert all(later < earlier for earlier, later in pairwise(entered))
    numbers = [unit.number for unit in found.arrangement.units]
    assert numbers == sorted(numbers)
    assert set(numbers) < set(entered[-1])
    assert set(found.dropped_at) == set(range(len(DOCUMENTS))) - set(numbers)
    room = Room.of(arranged, chosen.placement, model().max_length, 8)
    assert chosen.placement.span([u.length for u in found.arrangement.units]) <= room.capacity


def test_where_documents_fit_heats_change_no_bit() -> None:
    arranged = arrangement()
    with_heats, without = (
        look(model(), arranged, policy(window=None, heats=heats)) for heats in (Heats(fill=0.1), None)
    )
    assert torch.equal(with_heats.read.logits, without.read.logits)
    assert torch.equal(with_heats.read.mass, without.read.mass)
    assert with_heats.focus.dropped_at == without.focus.dropped_at
    assert with_heats.question_mass == without.question_mass
    everyone = look(model(), arranged, policy(len(DOCUMENTS), window=None))
    assert torch.equal(everyone.read.logits, look(model(), arranged, PLAIN).read.logits)


def test_the_query_stays_in_the_range_and_the_end_is_read_as_if_alone() -> None:
    arranged = arrangement()
    chosen = policy()
    looked = look(model(), arranged, chosen, max_new_tokens=8)
    left = [s.document for s in looked.composed.table if s.document is not None]
    assert len(left) < len(DOCUMENTS)
    assert max(looked.composed.positions) < WINDOW
    assert all(s.end <= WINDOW for s in looked.composed.table)
    ends = [s.end for s in looked.composed.table]
    assert ends == sorted(ends)
    assert len(set(ends)) == len(ends)  # nobody shares a place
    assert chosen.pruning is not None
    alone = replace(chosen, pruning=replace(chosen.pruning, heats=None))
    expected = look(model(), arranged.only(left), alone, max_new_tokens=8)
    assert torch.equal(looked.read.logits, expected.read.logits)
    assert looked.focus.kept == expected.focus.kept


def test_the_best_come_through_by_scores_given_beforehand() -> None:
    looked = look(model(), arrangement(), policy(1, scorer=TRUTH, start=1))
    assert looked.focus.kept == (BEST,)
    first = look(model(), arrangement(), policy(2, scorer=RankScore(), start=1))
    assert first.focus.kept == (0, 1)
    # a heat's own scorer decides there, and only there
    mixed = policy(2, scorer=RankScore(), start=1, heats=Heats(winners=1, scorer=TRUTH))
    through = ran(mixed, arrangement()).arrangement
    assert BEST in {unit.number for unit in through.units}


def test_storage_order_is_irrelevant() -> None:
    arranged = arrangement()
    texts = [DOCUMENTS[i] for i in (4, 2, 7, 0, 9, 1, 10, 3, 6, 5, 8)]
    rows = encode(model(), [model().text.tokenize(t) for t in texts], arranged.prefix)
    stored = dict(zip(texts, rows, strict=True))
    units = tuple(replace(unit, kv=stored[DOCUMENTS[unit.number]]) for unit in arranged.units)
    one, other = (look(model(), a, policy()) for a in (arranged, replace(arranged, units=units)))
    assert one.focus.kept == other.focus.kept
    assert one.focus.dropped_at == other.focus.dropped_at


def test_deeper_scores_read_deeper() -> None:
    arranged = arrangement()
    assert ran(policy(), arranged).depth == 2
    assert ran(policy(scorer=AttentionScore(), start=3), arranged).depth == 3
    assert ran(policy(scorer=RankScore()), arranged).depth == 1
    assert ran(policy(heats=Heats(depth=1)), arranged).depth == 1
    assert ran(policy(heats=Heats(depth=99)), arranged).depth == model().num_layers


def test_documents_of_which_no_two_fit_share_positions_as_ever() -> None:
    arranged = arrangement()
    length = max(unit.length for unit in arranged.units)
    window = arranged.start + len(arranged.question) + length + 14
    chosen = policy(window=window)
    assert not ran(chosen, arranged).heats
    looked = look(model(), arranged, chosen, max_new_tokens=8)
    assert len(looked.focus.kept) == 2


# ---- whole answers


def ask(engine: Engine, chosen: Policy) -> Answer:
    prompt = "\n\n".join(["Read this.", *DOCUMENTS, "When was the lighthouse of Hale built?"])
    settings = Sampling(max_new_tokens=8, ignore_eos=True)
    return engine.answer(prompt, DOCUMENTS, prefix="Read this.\n\n", sampling=settings, policy=chosen)


def test_deeper_layers_of_those_who_lost_are_never_read(tmp_path: Path) -> None:
    with Engine(model(), tmp_path / "store") as first:
        ask(first, PLAIN)
    with Engine(model(), tmp_path / "store") as engine:
        answer = ask(engine, policy(1, start=1, scorer=TRUTH))
        assert isinstance(engine.store, DiskStore)
        assert engine.store.stats().bytes_read == answer.usage.read_bytes
    # scores that are given need one layer of a heat
    layers, per_layer = model().num_layers, answer.usage.cached_bytes / model().num_layers
    total = sum(u.num_tokens for u in answer.documents)
    assert [u.is_read for u in answer.documents] == [i == BEST for i in range(len(DOCUMENTS))]
    assert sum(u.dropped_at == 1 for u in answer.documents) >= len(DOCUMENTS) // 2
    expected = sum(u.num_tokens / total * (u.dropped_at or layers) for u in answer.documents)
    assert answer.usage.read_bytes == pytest.approx(per_layer * expected, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        {"repair": FirstRows(4)},
        {"repair": QueryDriven(0.3)},
        {"second_look": SecondLook(after=2, keep=1)},
        {"per_layer": True},
        {"spans": True},
        {"max_risk": 0.0},
    ],
    ids=["first rows", "query-driven", "second look", "per layer", "spans", "in full"],
)
def test_heats_compose_with_what_else_a_policy_has(tmp_path: Path, more: dict[str, object]) -> None:
    with Engine(model(), tmp_path / "store") as engine:
        answer = ask(engine, replace(policy(2), **more))  # type: ignore[arg-type]
    assert len(answer.tokens) == 8
    read = [u for u in answer.documents if u.is_read]
    in_full = "max_risk" in more
    assert answer.in_full == in_full
    assert 0 < len(read) < len(DOCUMENTS)
    assert sum(u.focus for u in answer.documents) == pytest.approx(1)
    lost = [u for u in answer.documents if u.mass == 0]  # no row that chose a token read them
    assert len(lost) > len(DOCUMENTS) // 2
    assert all(not u.is_read and u.span is None and u.dropped_at is not None for u in lost)
    assert sum(u.dropped_at == 2 for u in lost) > len(DOCUMENTS) // 2  # layer 1 is the last of a heat
    assert all(0 < u.question_mass < 1 for u in answer.documents)


def test_the_preset_takes_heats(tmp_path: Path) -> None:
    chosen = cachefocus(2, layers=(1,), heats=Heats())
    chosen = replace(chosen, placement=replace(chosen.placement, window=WINDOW))
    with Engine(model(), tmp_path / "store") as engine:
        answer = ask(engine, chosen)
    assert sum(u.is_read for u in answer.documents) == 2
