"""The comparison of policies: what is read in shared passes answers like what is read alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvrag.focus.policy import PLAIN, Policy, cachefocus, epic, pcw
from kvrag.focus.pruning import AttentionScore, Pruning
from kvrag.focus.repair import Deviation, QueryDriven
from kvrag.looking import Look, looking
from kvrag.model import Model
from kvrag.prefill import alone, read_first

# One of each way of reading; the command's --smoke compares all of them.
NAMES = {
    *(
        "re-positioning",
        "APE .9/.9",
        "keep 1, align",
        "keep 2 documents, best layer, heats",
        "keep .5, random",
    ),
    *("second look, keep .5", "EPIC 4", "CacheBlend .15", "keep .5, best layers + query-driven"),
    *("encoded behind parts before", "encoded behind 2 similar"),
}
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
POLICIES = {
    "plain": PLAIN,
    "plain again": PLAIN,
    "pruned": cachefocus(),
    "pruned late": Policy(pruning=Pruning(keep=1, start=3, scorer=AttentionScore((1,)))),
    "at one place": pcw(),
    "first rows": epic(),
    "deviation": Policy(repair=Deviation()),
    "query-driven": Policy(repair=QueryDriven(layers=(0, 1), looked_by="last")),
}


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """Modules of the benchmark, found as when it is run as a script."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("asking", "contexts", "policies", "records", "together")
        yield {n: import_module(f"quality_parts.{n}") for n in names} | {"run": import_module("quality")}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.startswith("quality"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def bench(parts: dict[str, ModuleType]) -> Any:
    return parts["asking"].Bench(Model.load(), window=2304, longest=16_000)


@pytest.fixture(scope="module")
def opened(parts: dict[str, ModuleType], bench: Any) -> Any:
    return bench.open(parts["contexts"].draw(0, 4, 0)[0])


def _work(model: Model, opened: Any, policy: Policy) -> Any:
    return looking(model, opened.arrangement(opened.context.asked[0].question.text), policy)


@pytest.fixture(scope="module")
def looks(parts: dict[str, ModuleType], bench: Any, opened: Any) -> dict[str, tuple[Look, Look]]:
    """Each policy's look on its own and among the others."""
    sharing = parts["together"].Sharing(bench.model)
    works = [_work(sharing, opened, policy) for policy in POLICIES.values()]
    shared = parts["together"].together(sharing, works)
    assert len(sharing.known.layers) < len(works) * bench.model.num_layers
    own = [alone(bench.model, _work(bench.model, opened, policy)) for policy in POLICIES.values()]
    return dict(zip(POLICIES, zip(own, shared, strict=True), strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_a_look_among_others_is_the_one_alone(looks: dict[str, tuple[Look, Look]], name: str) -> None:
    own, shared = looks[name]
    torch.testing.assert_close(shared.read.logits, own.read.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared.read.mass, own.read.mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.read.focus, own.read.focus, rtol=1e-4, atol=1e-5)
    assert shared.composed.tokens == own.composed.tokens
    assert shared.focus.dropped_at == own.focus.dropped_at
    assert shared.recomputed == own.recomputed
    assert shared.fresh.positions == own.fresh.positions
    for layer in range(5):
        torch.testing.assert_close(shared.fresh.rows(layer), own.fresh.rows(layer), rtol=1e-4, atol=1e-4)


def test_the_same_policy_twice_is_the_same_to_the_bit(looks: dict[str, tuple[Look, Look]]) -> None:
    first, second = looks["plain"][1], looks["plain again"][1]
    assert torch.equal(first.read.logits, second.read.logits)
    assert torch.equal(first.read.mass, second.read.mass)


def test_answers_read_together_are_those_read_alone(parts: dict[str, ModuleType], bench: Any) -> None:
    policies = parts["policies"]
    layer = AttentionScore((1,), "last", squared=True)
    entries = policies.entries(policies.Scores(layer, layer, (0, 1), "last"), 2304)
    chosen = [entry for entry in entries if entry.name in NAMES]
    assert {entry.name for entry in chosen} == NAMES
    ways = dict.fromkeys(("one", "compare"), chosen)
    shared, own = (parts["run"].asked(bench, ways, 0, 1, 3, timed=timed) for timed in (False, True))
    parts["run"].check_alike(shared, own)
    assert {record["kind"] for record in shared} == set(ways)
    for one, other in zip(shared, own, strict=True):
        assert list(one["answers"]) == list(other["answers"])
        assert one["best"] == other["best"]
        assert one["risk"] == pytest.approx(other["risk"], abs=2e-4)
        # Only who has the machine to himself is on the clock.
        assert all(answer[2] is None for answer in one["answers"].values())
        assert all(answer[2] > 0 for answer in other["answers"].values())


def test_answers_that_differ_are_refused(parts: dict[str, ModuleType]) -> None:
    some = [{"kind": "one", "answers": {"naive": [1, 1, None, 0]}}]
    with pytest.raises(SystemExit, match="naive, one"):
        parts["run"].check_alike(some, [{"kind": "one", "answers": {"naive": [0, 1, 2.0, 0]}}])


def test_full_attention_that_was_right_is_not_read_again(
    parts: dict[str, ModuleType], bench: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = parts["policies"].Entry("plain", "placement", lambda _: PLAIN)
    asked = opened.context.asked[:1]
    kind = asked[0].question.kind
    (new,) = opened.ask([(asked[0], [entry])], 0)
    told = new["answers"]
    full, truncated = parts["policies"].FULL, parts["policies"].TRUNCATED
    assert told[full][0] == 1

    def never(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(opened, "full", never)
    (again,) = opened.ask([(asked[0], [entry])], 0, told={kind: told})
    assert again["answers"] == {"plain": told["plain"]}
    # A question that full attention was not asked is not compared with it now.
    (apart,) = opened.ask([(asked[0], [entry])], 0, told={kind: {truncated: told[truncated]}})
    assert apart["answers"] == {"plain": [told["plain"][0], 0, None, 0]}


@pytest.mark.parametrize("right", [(5, 6, 7, 2), (5, 9, 7, 2)])
def test_what_is_known_of_an_answer_decides_without_another_pass(
    parts: dict[str, ModuleType], right: tuple[int, ...]
) -> None:
    says = parts["asking"]._says
    known = right[:2]

    def outcome(tokens: tuple[int, ...]) -> bool | None:
        work = says(None, PLAIN, tokens, right[0], known=known)
        try:
            next(work)
        except StopIteration as end:
            return bool(end.value)
        except AttributeError:  # it would look behind the question
            return None
        return None

    assert outcome(known) is True
    assert outcome((known[0], 99, 7, 2)) is False
    assert outcome((99,)) is False
    assert outcome(right) is None


def test_rows_up_to_a_layer_are_not_attended_in(bench: Any, opened: Any) -> None:
    from kvrag.attention import Fixed

    model = bench.model
    composed = opened.arrangement(opened.context.asked[0].question.text).composed()
    given = (model, Fixed(composed.table), composed.tokens, composed.positions)
    rows, whole = (read_first(*given, num_layers=2, rows_alone=alone_) for alone_ in (True, False))
    assert all(map(torch.equal, rows.fresh.rows(1), whole.fresh.rows(1)))
    assert (len(rows.mass), len(whole.mass)) == (1, 2)
    with pytest.raises(ValueError, match="nothing was read in layer 2"):
        rows.fresh.values(2)


def test_of_two_answers_the_timed_one_stays(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    folder = parts["records"].Folder(tmp_path)
    key = {"seed": 0, "turn": 0, "documents": 1, "kind": "one"}
    folder.add(0, [key | {"answers": {"a": [1, 1, None, 0], "b": [1, 1, None, 0]}}])
    folder.add(1, [key | {"answers": {"a": [1, 1, 5.0, 0], "c": [0, 0, None, 0]}, "timed": True}])
    (record,) = folder.records()
    assert record["answers"] == {"a": [1, 1, 5.0, 0], "b": [1, 1, None, 0], "c": [0, 0, None, 0]}
    assert record["timed"]
