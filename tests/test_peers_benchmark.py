"""What benchmarks/peers.py rests on: what requests have in common, TurboRAG's way, reused caches, pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.encoding import encode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("asked", "plain", "turborag", "ours", "agreement", "taking", "page")
REQUESTS = st.lists(st.permutations(range(6)).map(lambda order: tuple(order[:3])), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the benchmark, found as when it is run as a script."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        made = {name: import_module(f"peers_parts.{name}") for name in NAMES}
        yield made | {"run": import_module("peers"), "report": import_module("report")}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if BENCHMARKS in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]


@pytest.fixture(scope="module")
def sides(bench: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everybody but llama.cpp, with a tiny model."""
    folder = tmp_path_factory.mktemp("peers")
    run = bench["run"]
    model = run.build(run.SMOKE, torch.float32, "cpu")
    pool = bench["asked"].Pool(8, 24, 8, run.SMOKE.vocabulary)
    rows = encode(model, pool.documents)
    turbo = bench["turborag"].TurboRag(model.network, folder, pool)
    for number, kv in enumerate(rows):
        turbo.save(number, kv)
    ours = bench["ours"].Ours(model, folder / "store", pool, rows)
    stored = {"TurboRAG's way": turbo, "kvrag": ours}
    plain = bench["plain"].Plain(model.network)
    return bench["taking"].Sides(pool, folder, plain, stored, None, new_tokens=3, quick=1)


@given(requests=REQUESTS)
def test_who_keeps_more_reads_less(bench: dict[str, ModuleType], requests: list[tuple[int, ...]]) -> None:
    found = bench["asked"].shares(requests, 4)
    last, moved, few, earlier, each = found.values()
    assert 0 <= last <= moved <= each <= 1
    assert last <= few <= earlier <= each


@given(requests=REQUESTS)
def test_documents_are_read_once_each(bench: dict[str, ModuleType], requests: list[tuple[int, ...]]) -> None:
    asked = [number for documents in requests for number in documents]
    share = bench["asked"].shares(requests, 1)["each document"]
    assert share == pytest.approx(1 - len(set(asked)) / len(asked))


@pytest.mark.parametrize(
    ("held", "wanted", "found"),
    [
        ((1, 2, 3, 4), (2, 3, 4, 5), 3),  # all move to the front
        ((1, 2, 3, 4), (1, 4, 2, 3), 2),  # what would have to move back is lost
        ((1, 2, 3, 4), (4, 1, 2, 3), 1),  # and all that stands before it
        ((), (1, 2), 0),
        ((1, 2), (1, 2), 2),
    ],
)
def test_runs_move_to_the_front_only(
    bench: dict[str, ModuleType], held: tuple[int, ...], wanted: tuple[int, ...], found: int
) -> None:
    assert bench["asked"].moved(held, wanted) == found


def test_popular_documents_are_drawn_more_often(bench: dict[str, ModuleType]) -> None:
    drawn = bench["asked"].many(500, 8, 2, 1.0)
    assert all(len(set(documents)) == 2 for documents in drawn)
    times = [sum(number in documents for documents in drawn) for number in range(8)]
    assert times[0] > 2 * times[7]
    assert {first for first, _ in drawn} == set(range(8))


def test_turborags_way_computes_what_kvrag_does(bench: dict[str, ModuleType], sides: Any) -> None:
    apart = bench["agreement"].agreement(sides, 4)
    assert max(apart.values()) < 1e-4


def test_documents_elsewhere_are_not_the_same(bench: dict[str, ModuleType], sides: Any) -> None:
    turbo, pool = sides.stored["TurboRAG's way"], sides.pool
    question = pool.ask((0,)).question
    request = bench["asked"].Request
    one = turbo.logits(request((0, 1, 2), question))
    other = turbo.logits(request((2, 1, 0), question))
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_reused_beginning_changes_no_token(bench: dict[str, ModuleType], sides: Any) -> None:
    plain, pool = sides.plain, sides.pool
    prompts = [pool.prompt(pool.ask(documents)) for documents in ((0, 1), (0, 1), (0, 2), (3, 1))]
    alone = []
    for prompt in prompts:
        plain.forget()
        alone.append(plain.ask(prompt, 1))
    plain.forget()
    after = [plain.ask(prompt, 1) for prompt in (*prompts, prompts[0])]
    plain.forget()
    assert [took.token for took in after] == [took.token for took in (*alone, alone[0])]
    assert [took.reused for took in alone] == [0] * 4
    assert [took.reused for took in after[:4]] == [0, 48, 24, 0]
    assert after[4].reused == len(prompts[0]) - 1


def test_a_row_of_requests(bench: dict[str, ModuleType], sides: Any) -> None:
    pool = sides.pool
    found = bench["taking"].turn(sides, [pool.ask(documents) for documents in ((0, 1), (0, 2), (4, 5))], ())
    assert found["transformers"]["reused"] == pytest.approx(1 / 6)
    assert found["kvrag"]["reused"] == found["TurboRAG's way"]["reused"] == 1
    assert all(took["total"] >= took["median"] > 0 for took in found.values())


def case(first: float, each: float | None = None) -> dict[str, float]:
    return {"first": first} | ({} if each is None else {"each": each})


def test_who_is_faster_than_kvrag_is_named(bench: dict[str, ModuleType]) -> None:
    ours = {"warm": case(0.4, 0.1), "cold": case(0.5)}
    slow = {"full": case(20.0, 0.11), "same": case(0.41), "half": case(10.0)}
    fast = {"full": case(4.4, 0.05), "same": case(0.2), "file": case(0.5), "half": case(2.0)}
    cases = {"transformers": slow, "llama.cpp Q8_0": fast, "kvrag": ours, "TurboRAG's way": slow | ours}
    lines = bench["page"]._losses({"cases": {"8": cases}})[2:]
    assert lines == [
        "- llama.cpp, Q8_0: the first token with the same documents again, kept in memory, 2 times as fast.",
        "- llama.cpp, Q8_0: each further token, 2 times as fast; its whole answer from nothing "
        "is there first from 81 tokens on.",
    ]
    nobody = bench["page"]._losses({"cases": {"8": {"transformers": slow, "kvrag": ours}}})
    assert nobody == ["Nothing was faster than kvrag's float32 rows in the page cache."]


def test_a_busy_machine_shows_processor_seconds(bench: dict[str, ModuleType]) -> None:
    took = {"first": 9.0, "first_busy": 0.5, "each": 8.0, "each_busy": 0.25, "reused": 0, "runs": 1}
    sides = {"transformers": ("full", "same", "half"), "kvrag": ("warm", "cold")}
    sides |= dict.fromkeys(("kvrag int8", "TurboRAG's way"), sides["kvrag"])
    found: dict[str, Any] = {
        "conditions": {
            **dict.fromkeys(("parameters", "document_tokens", "pool", "question_tokens", "threads"), 1),
            **dict.fromkeys(("device", "torch", "transformers", "python", "date", "cpu_capability"), "x"),
            "shape": {"layers": 1, "hidden": 1, "kv_heads": 1, "head_dim": 1},
            **{"cores": 2, "load": 9.0, "load_after": 1, "seconds": 60.0, "rounds": 1, "quick": 1},
        },
        "cases": {"8": {side: dict.fromkeys(cases, took) for side, cases in sides.items()}},
        "bytes_per_token": dict.fromkeys(sides, 10.0),
        "turn": {
            "requests": 2,
            "documents": 4,
            "sides": {"kvrag": {"median": 9, "median_busy": 1, "total": 9, "total_busy": 1, "reused": 1}},
        },
        "shares": {"0": {"each document": 1.0}},
        "agreement": {"TurboRAG's way": 1e-6},
    }
    busy = bench["page"].lines(found)
    assert "| transformers, `generate` | 500 | 1x |" in busy
    assert any("seconds of the processor" in line for line in busy)
    found["conditions"]["load"] = 1.0
    quiet = bench["page"].lines(found)
    assert "| transformers, `generate` | 9,000 | 1x |" in quiet
    assert not any("seconds of the processor" in line for line in quiet)


def test_a_whole_answer_is_its_tokens(bench: dict[str, ModuleType]) -> None:
    assert bench["page"].answer_seconds(case(2.0), 0.5, 1) == 2.0
    assert bench["page"].answer_seconds(case(2.0), 0.5, 5) == 4.0


def test_a_section_is_put_between_its_marks(bench: dict[str, ModuleType]) -> None:
    marks = (
        "<!-- from docs/data/x.json by benchmarks/report.py; do not edit -->\n",
        "<!-- end of x.json -->\n",
    )
    page = f"before\n{marks[0]}old\n{marks[1]}after\n"
    made = bench["report"].with_section(page, "x.json", ["new"])
    assert made == f"before\n{marks[0]}\nnew\n\n{marks[1]}after\n"
    assert bench["report"].with_section(made, "x.json", ["new"]) == made
    with pytest.raises(SystemExit, match="no section"):
        bench["report"].with_section("before\n", "x.json", ["new"])
