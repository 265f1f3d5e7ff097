"""The parts of benchmarks/quality.py that need no model: figures, contexts, run folders, the page."""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KINDS = ("one", "crossing", "two_hop", "compare")
NAMES = ("summary", "records", "contexts", "policies", "claims", "page")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the benchmark, found as when it is run as a script."""
    from importlib import import_module

    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {"run": import_module("quality")} | {n: import_module(f"quality_parts.{n}") for n in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.startswith("quality"):
                del sys.modules[name]


def test_intervals_contain_the_share(bench: dict[str, ModuleType]) -> None:
    wilson = bench["summary"].wilson
    assert wilson(0, 0) == (0.0, 1.0)
    for good, asked in ((0, 10), (10, 10), (3, 500)):
        low, high = wilson(good, asked)
        assert 0 <= low <= good / asked <= high <= 1
        assert high - low > 0


def test_paired_difference_uses_discordant_questions_only(bench: dict[str, ModuleType]) -> None:
    paired = bench["summary"].paired
    value, low, high = paired(30, 10, 500)
    assert value == pytest.approx(0.04)
    assert 0 < low < value < high
    value, low, high = paired(0, 0, 500)
    assert value == 0
    assert -0.01 < low < 0 < high < 0.01


def test_auc(bench: dict[str, ModuleType]) -> None:
    auc = bench["summary"].auc
    assert auc([], [1.0]) is None
    assert auc([2.0, 3.0], [0.0, 1.0])[0] == 1
    assert auc([1.0, 1.0], [1.0])[0] == 0.5
    assert auc([0.0], [1.0, 2.0])[0] == 0


@pytest.mark.parametrize("num", [1, 2, 7])
def test_contexts_have_every_kind_and_the_gold_document_at_its_rank(
    bench: dict[str, ModuleType], num: int
) -> None:
    contexts = bench["contexts"]
    for turn in range(4):
        drawn = contexts.draw(0, num, turn)
        assert drawn == contexts.draw(0, num, turn)
        kinds = [asked.question.kind for context in drawn for asked in context.asked]
        assert sorted(kinds) == sorted(contexts.kinds_of(num))
        for context in drawn:
            name, place = contexts.rank_of(turn, num, random.Random(0))
            assert context.rank == name
            assert len(context.documents) == num
            assert name == "random" or context.place == place
            for asked in context.asked:
                assert context.documents[context.place].entity.name == asked.question.titles[0]


def test_gold_units_hold_the_facts(bench: dict[str, ModuleType]) -> None:
    contexts = bench["contexts"]
    for context in contexts.draw(1, 6, 0):
        for asked in context.asked:
            assert asked.gold
            assert asked.gold <= asked.needed
            num_facts = 2 if asked.question.kind in ("two_hop", "compare") else 1
            assert len(asked.gold) in range(1, num_facts + 1)
            values = [span.text.strip() for span in asked.question.spans if span.is_value]
            told = " ".join(context.parts[i] for i in asked.needed)
            assert all(value in told for value in values)
            if asked.question.kind == "crossing":
                assert len(asked.needed) == 2


def test_policies_have_different_names(bench: dict[str, ModuleType]) -> None:
    from kvrag.focus.pruning import AttentionScore

    policies = bench["policies"]
    layers = AttentionScore((1,))
    made = policies.entries(policies.Scores(layers, layers, (1,)), 123)
    names = {entry.name for entry in made}
    assert len(names) == len(made)
    assert names >= policies.CORE | policies.CORE_REPAIRS
    hint = policies.Hint((1.0, 0.0), 5, (0.2, 0.1))
    assert {entry.make(hint).placement.window for entry in made} == {123}


@pytest.fixture
def policies(bench: dict[str, ModuleType]) -> list[object]:
    """Two that answer in every turn, two that answer in some, one of them only over many documents."""
    entry = bench["policies"].Entry
    make = bench["policies"].presets.naive
    names = {"re-positioning": 1, "EPIC 16": 1, "keep 1, sort": 1, "truncate": 20}
    families = {"EPIC 16": "repair"}
    return [entry(n, families.get(n, "placement"), lambda _: make(), least) for n, least in names.items()]


def test_a_killed_run_goes_on_where_it_stopped(
    bench: dict[str, ModuleType], policies: list[object], tmp_path: Path
) -> None:
    folder = bench["records"].Folder(tmp_path)
    args = Namespace(
        seed=3, questions=2, minutes=None, documents=[1, 5], smoke=True, kinds=KINDS, rest_every=1
    )
    turns = bench["run"].turns
    assert len(list(turns(args, folder, policies))) == 4
    answers = {name: [1, 1, 1.0, 0] for name in ("re-positioning", "EPIC 16", "keep 1, sort")}
    first = {"seed": 3, "turn": 0, "documents": 1, "answers": answers}
    folder.add(3, [first | {"kind": kind} for kind in ("one", "crossing")])
    folder.add(4, [first | {"seed": 4, "turn": 1, "kind": "one"}])
    with (tmp_path / "records-3.jsonl").open("a") as file:
        file.write('{"seed": 3, "turn": 0, "docum')
    folder.add(3, [first | {"documents": 5, "kind": "compare"}])
    assert len(folder.records()) == 4
    left = list(turns(args, folder, policies))
    assert [(turn, num, len(kinds)) for turn, num, kinds in left] == [(0, 5, 3), (1, 1, 2), (1, 5, 4)]


def test_policies_that_are_missing_are_asked_later(
    bench: dict[str, ModuleType], policies: list[object], tmp_path: Path
) -> None:
    folder, turns = bench["records"].Folder(tmp_path), bench["run"].turns
    args = Namespace(
        seed=0, questions=2, minutes=None, documents=[1, 40], smoke=True, kinds=KINDS, rest_every=3
    )

    def names() -> dict[tuple[int, int], set[str]]:
        left = turns(args, folder, policies)
        return {(turn, num): {e.name for e in kinds["one"]} for turn, num, kinds in left}

    everything = {"re-positioning", "EPIC 16", "keep 1, sort"}
    assert names() == {
        (0, 1): everything,
        (0, 40): everything | {"truncate"},
        (1, 1): {"re-positioning", "EPIC 16"},
        (1, 40): {"re-positioning"},
    }
    key = {"seed": 0, "turn": 1, "documents": 1}
    for kind in ("one", "crossing"):
        core = {name: [1, 1, 1.0, 0] for name in ("re-positioning", "EPIC 16")}
        folder.add(0, [key | {"kind": kind, "risk": [1.0], "answers": core}])
    args.rest_every = 1
    assert names()[1, 1] == {"keep 1, sort"}
    again = {"keep 1, sort": [0, 0, 1.0, 0], "re-positioning": [0, 0, 9.0, 0]}
    folder.add(0, [key | {"kind": "one", "answers": again}])
    merged = next(r for r in folder.records() if r["kind"] == "one")
    assert set(merged["answers"]) == everything
    assert merged["answers"]["re-positioning"] == [1, 1, 1.0, 0]  # the first time counts
    assert merged["risk"] == [1.0]


def test_a_new_folder_begins_with_the_archive(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    first, archive = bench["records"].Folder(tmp_path / "first"), tmp_path / "archive.jsonl.xz"
    made = {"weights": "a", "window": 1, "score_layers": None}
    assert not first.unpack(archive, made)
    first.adopt(made | {"calibration": 7})
    first.add(2, [{"seed": 2, "turn": 0, "documents": 1, "kind": "one", "answers": {}}])
    first.pack(archive)
    second = bench["records"].Folder(tmp_path / "second")
    assert not second.unpack(archive, made | {"weights": "b"})
    assert second.unpack(archive, made)
    assert second.adopt(made)["calibration"] == 7
    assert second.records() == first.records()
    assert not second.unpack(archive, made)  # it has records of its own


def test_a_folder_holds_records_of_one_model(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    folder = bench["records"].Folder(tmp_path)
    made = {"weights": "a", "window": 1, "score_layers": None}
    assert folder.adopt(made | {"calibration": 1}) == folder.adopt(made) == made | {"calibration": 1}
    with pytest.raises(SystemExit, match="weights a, not b"):
        folder.adopt(made | {"weights": "b"})


def _records(bench: dict[str, ModuleType], num_turns: int = 100) -> list[dict[str, object]]:
    """Answers of three policies: full attention falls off behind 10 documents, the others do not."""
    rng, found = random.Random(0), []
    full, plain, sort = bench["policies"].FULL, bench["policies"].PLAIN, "keep .5, sort"
    repaired = "query-driven .15, best layers"
    for num in (2, 10, 40):
        for turn in range(num_turns):
            for kind in bench["contexts"].KINDS:
                good = [num < 40, True, rng.random() < 0.99, True]
                answers = {
                    name: [int(right), int(right == good[0]), 5.0 + num * (name == full), 10]
                    for name, right in zip((full, plain, sort, repaired), good, strict=True)
                }
                answers[bench["policies"].TRUNCATED] = [int(num < 40), 1, 5.0, 0]
                found.append(
                    {
                        "seed": 0,
                        "turn": turn,
                        "kind": kind,
                        "documents": num,
                        "rank": bench["contexts"].RANKS[turn % 4],
                        "units": num,
                        "tokens": num * 180,
                        "fits": num < 20,
                        "risk": [0.1, 0.2, rng.random()],
                        "best": [[1, 0]] * 4,
                        "answers": answers,
                    }
                )
    return found


def _data(bench: dict[str, ModuleType]) -> dict[str, object]:
    chosen = {"best layer": "layers 1", "best pair": "layers 0, 1", "best layers for repair": "layers 1"}
    families = {bench["policies"].FULL: "reference", bench["policies"].TRUNCATED: "reference"}
    families |= {bench["policies"].PLAIN: "placement", "keep .5, sort": "pruning"}
    made = {
        "date": "2026-01-01",
        "model": "m",
        "weights": "0",
        "parameters": 1_000_000,
        "layers": 2,
        "window": 2304,
        "seeds": [0],
        "questions": 480,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "load": [0.0],
        "torch": "2",
        "transformers": "5",
        "python": "3",
    }
    return {
        "conditions": made,
        "calibration": {"asked": 1, "precision": [], "chosen": chosen},
        "variants": ["a", "b", "c", "d"],
        "families": families | {"query-driven .15, best layers": "repair"},
        **bench["summary"].summary(_records(bench)),
    }


def test_claims_follow_the_figures(bench: dict[str, ModuleType]) -> None:
    claims = bench["claims"]
    found = {v.claim: v.verdict for v in claims.verdicts(claims.Measured(_data(bench)))}
    assert found["full attention falls off beyond the window"] == claims.HOLDS
    assert found["inside the window at least 95 % of answers unchanged"] == claims.HOLDS
    assert found["reuse without repair costs quality inside the window (over 1 point)"] == claims.FAILS
    assert found["time to first token falls by 47 % at about 4K tokens"] == claims.HOLDS
    few = claims.below(-0.05, 0.05, 0.01)
    assert few == claims.OPEN


def test_every_kind_weighs_as_much_where_one_was_asked_more_often(bench: dict[str, ModuleType]) -> None:
    """Of all kinds together only turns count in which a policy answered every kind."""
    summary, plain = bench["summary"], bench["policies"].PLAIN

    def cell(records: list[dict[str, object]]) -> dict[str, object]:
        rows = summary.rows_of(summary.summary(records)["cells"])
        return next(r for r in rows if (r["policy"], r["documents"], r["kind"]) == (plain, 10, summary.ALL))

    even = _records(bench)
    more = [
        {**record, "turn": 1_000 + i, "answers": {plain: [0, 0, None, 0]}}
        for i, record in enumerate(even)
        if record["kind"] == "one"
    ]
    assert cell(even)["asked"] == 400
    assert cell(even + more) == cell(even)


def test_the_page_survives_json(bench: dict[str, ModuleType]) -> None:
    data = json.loads(json.dumps(_data(bench)))
    lines = bench["page"].lines(data)
    assert "## One-document questions" in lines
    assert any("100.0" in line and line.startswith("| re-positioning") for line in lines)


def test_times_are_those_of_quiet_runs_where_there_are_some(bench: dict[str, ModuleType]) -> None:
    summary, full = bench["summary"], bench["policies"].FULL

    def medians(*milliseconds: float | None, timed: tuple[float | None, ...] = ()) -> list[float]:
        records = [{"documents": 5, "answers": {full: [1, 1, ms, 0]}} for ms in milliseconds]
        records += [{"documents": 5, "answers": {full: [1, 1, ms, 0]}, "timed": True} for ms in timed]
        return [row[2] for row in summary._ttft(records, [full])]

    assert medians(900.0, 800.0) == [850.0]
    assert medians(900.0, 800.0, timed=(100.0,)) == [100.0]
    assert medians(timed=(100.0, None, 300.0)) == [200.0]  # what was added off the clock has no time
    assert medians(None, None) == []
