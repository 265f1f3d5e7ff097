"""Load or recompute: the model of costs, what is measured, and that answers do not depend on the choice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.choosing import runs_of
from kvrag.config import Sampling
from kvrag.costs import CostTable, PrefillSpeed, Rate, choose, clearly_loaded
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.segments import KV
from kvrag.speeds import FILE, Speeds, disk_rate, link_rate, prefill_speed
from kvrag.store.base import CheckReport, KVStore, Receipt, StoreStats
from kvrag.store.disk import DiskStore
from kvrag.store.found import Place
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore
from kvrag.testing.models import tiny
from kvrag.testing.stores import assert_same_rows

PREFIX = "Read this.\n\n"
DOCUMENTS = {
    "lighthouse": "The lighthouse of Varn was built in 1871.",
    "ferry": "A ferry crosses the Mirrow twice a day, and bicycles travel free.",
}
PROMPT = f"{PREFIX}{DOCUMENTS['lighthouse']}\n\n{DOCUMENTS['ferry']}\n\nWhy?"
SHORT = Sampling(max_new_tokens=6)
MODEL = tiny()
SPEED = PrefillSpeed((64, 0.064), (512, 0.768))  # about a millisecond per token
SLOW = CostTable(SPEED, {"throttled": Rate(1e4, 1.0)}, token_bytes=1024)
FAST = CostTable(SPEED, {"throttled": Rate(1e12), "disk": Rate(1e12)}, token_bytes=1024)

seconds = st.floats(1e-6, 1e3)


class Throttled:
    """A store that counts what it is asked for, as one far away; does not say where entries are."""

    name = "throttled"

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.loads: list[str] = []
        self.puts: list[tuple[str, float]] = []

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        self.loads.append(key.id)
        return self.store.get(key, by_layer=by_layer)

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        self.puts.append((key.id, cost_seconds))
        self.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)

    def delete(self, key_id: str) -> Receipt:
        return self.store.delete(key_id)

    def __contains__(self, key: object) -> bool:
        return key in self.store

    def ids(self) -> Iterator[str]:
        return self.store.ids()

    def stats(self) -> StoreStats:
        return self.store.stats()

    def check(self, *, fix: bool = False) -> CheckReport:
        return self.store.check(fix=fix)

    def close(self) -> None:
        self.store.close()


def ask(engine: Engine) -> Any:
    return engine.answer(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=SHORT)


# ---- the model of costs


def test_loading_takes_latency_by_the_round_and_bytes_by_the_rate() -> None:
    rate = Rate(1000.0, latency=0.5)
    assert rate.seconds(2000) == 2.5
    assert rate.seconds(2000, entries=6) == 2.5  # six are fetched side by side
    assert rate.seconds(2000, entries=7) == 3.0
    table = CostTable(None, {"near": Rate(1e6), "far": rate}, link=Rate(4000.0))
    assert table.load_seconds([("near", 1000), ("far", 1000)]) == pytest.approx(0.001 + 1.5 + 0.5)
    assert table.load_seconds([("nowhere", 1)]) is None


def test_reading_has_a_linear_and_a_quadratic_term() -> None:
    speed = PrefillSpeed((10, 1.0 + 0.1), (100, 10.0 + 10.0))  # 0.1 n + 0.001 n^2
    assert (speed.linear, speed.quadratic) == (pytest.approx(0.1), pytest.approx(0.001))
    assert speed.seconds(0, 50) == pytest.approx(5.0 + 2.5)
    assert speed.seconds(50, 50) == pytest.approx(5.0 + 10.0 - 2.5)


@given(st.integers(1, 500), st.integers(1, 500), seconds, seconds)
def test_terms_are_never_negative_and_go_through_the_long_length(
    short: int, more: int, a: float, b: float
) -> None:
    speed = PrefillSpeed((short, a), (short + more, b))
    assert min(speed.linear, speed.quadratic) >= 0
    assert speed.seconds(0, short + more) == pytest.approx(b, rel=1e-6)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 200), seconds, seconds)
def test_reading_documents_apart_never_takes_longer_than_reading_the_prompt(
    lengths: list[int], prefix: int, a: float, b: float
) -> None:
    speed = PrefillSpeed((64, a), (512, b))
    apart = sum(speed.seconds(prefix, n) for n in lengths)
    assert apart <= speed.seconds(0, prefix + sum(lengths)) * (1 + 1e-9)


@given(seconds, st.integers(1, 1 << 30), st.integers(1, 40), seconds)
def test_averages_follow_what_happens_but_not_a_hiccup(
    latency: float, num_bytes: int, entries: int, took: float
) -> None:
    rate = Rate(1e6, latency)
    before, after = (
        rate.seconds(num_bytes, entries),
        rate.after(num_bytes, entries, took).seconds(num_bytes, entries),
    )
    assert abs(after - took) <= abs(before - took) * (1 + 1e-6) or math.isclose(after, before)
    assert 0.7 < after / before < 1.4
    first = Rate.first(num_bytes, entries, took)
    assert first.seconds(num_bytes, entries) == pytest.approx(max(took, 1e-6), rel=0.01)


def test_readings_correct_the_length_they_are_close_to() -> None:
    slower = SPEED.after(0, 600, 10.0)
    assert slower.short == SPEED.short
    assert slower.long[1] > SPEED.long[1]
    assert SPEED.after(0, 30, 10.0).long == SPEED.long
    speed = SPEED
    for _ in range(60):
        speed = speed.after(0, 512, 2.0)
    assert speed.seconds(0, 512) == pytest.approx(2.0, rel=0.01)


places = st.sampled_from([Place("disk"), Place("far"), Place("nowhere"), Place("memory", is_at_hand=True)])


@given(
    st.lists(st.tuples(places, st.integers(0, 1 << 28), st.integers(1, 2000)), max_size=6),
    st.floats(1e5, 1e11),
    st.floats(0, 1),
    st.floats(1e-6, 1e-2),
)
def test_what_is_chosen_never_takes_longer_than_loading_all(
    documents: list[tuple[Place, int, int]], rate: float, latency: float, per_token: float
) -> None:
    speed = PrefillSpeed((1, per_token), (2, 2 * per_token))
    table = CostTable(speed, {"disk": Rate(1e9, 1e-4), "far": Rate(rate, latency)})

    def encode_seconds(numbers: Any) -> float:
        return sum(speed.seconds(0, documents[n][2]) for n in numbers)

    chosen = choose(table, [d[0] for d in documents], [d[1] for d in documents], encode_seconds)
    assert len(chosen) == len(documents)
    for (place, _, _), choice in zip(documents, chosen, strict=True):
        if place.is_at_hand or place.tier not in table.tiers:
            assert not choice.recompute
    known = [i for i, d in enumerate(documents) if d[0].tier in table.tiers and not d[0].is_at_hand]

    def total(anew: list[int]) -> float:
        load = [(documents[i][0].tier, documents[i][1]) for i in known if i not in anew]
        return (table.load_seconds(load) or 0.0) + encode_seconds(anew)

    picked = [i for i in known if chosen[i].recompute]
    if picked:
        assert total(picked) <= 0.9 * total([]) * (1 + 1e-9)  # clearly
    else:
        assert total([]) <= total(known) / 0.9 + 0.0021


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=6),
    st.lists(st.sampled_from(["disk", "far"]), min_size=6, max_size=6),
    st.floats(1e5, 1e11),
    st.floats(0, 0.1),
    st.floats(1e-6, 1e-2),
    st.floats(1, 1e5),
)
def test_what_is_clear_without_looking_is_what_looking_would_say(
    lengths: list[int], tiers: list[str], rate: float, latency: float, per_token: float, token_bytes: float
) -> None:
    speed = PrefillSpeed((1, per_token), (100, 150 * per_token))
    table = CostTable(speed, {"disk": Rate(1e9, 1e-4), "far": Rate(rate, latency)}, token_bytes=token_bytes)
    if clearly_loaded(table, ["disk", "far"], min(lengths)) is None:
        return
    sizes = [int(length * token_bytes) for length in lengths]
    where = [Place(tier) for tier in tiers[: len(lengths)]]
    chosen = choose(table, where, sizes, lambda n: sum(speed.seconds(7, lengths[i]) for i in n))
    assert not any(choice.recompute for choice in chosen)


def test_the_whole_answer_counts_not_only_each_document() -> None:
    """One by one loading wins; but all six tokens anew save the only wait for the far place."""
    speed = PrefillSpeed((1, 0.03), (2, 0.06))
    table = CostTable(speed, {"far": Rate(1e9, 0.1)})
    sizes, lengths = [1000] * 2, [4, 4]
    each = choose(table, [Place("far")] * 2, sizes, lambda n: sum(speed.seconds(0, lengths[i]) for i in n))
    assert [c.recompute for c in each] == [False, False]  # 0.12 s each, 0.1 s for both together
    cheap = choose(table, [Place("far")] * 2, sizes, lambda n: 0.03 * len(n))
    assert [c.recompute for c in cheap] == [True, True]
    assert "60.0 ms as chosen" in cheap[0].reason
    assert "all documents: 100.0 ms if loaded" in cheap[0].reason


def test_documents_of_one_run_are_read_in_one_go() -> None:
    runs, _ = runs_of([(3, 4), (5,)], [(1, 2), (1, 2, 3, 4)])
    assert [run.tokens for run in runs] == [(1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rate(0.0),
        lambda: Rate(1.0, -1.0),
        lambda: PrefillSpeed((4, 1.0), (4, 1.0)),
        lambda: PrefillSpeed((4, 1.0), (5, 0.0)),
        lambda: Engine(MODEL, recompute="sometimes"),
    ],
    ids=["rate", "latency", "lengths", "no time", "recompute"],
)
def test_settings_that_cannot_be(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()


# ---- answers


def test_a_store_that_loses_is_not_asked() -> None:
    store = Throttled(MemoryStore())
    with Engine(MODEL, store, costs=SLOW) as engine:
        first = ask(engine)
        assert store.loads == []  # presumed to be there, read anew, and found lacking
        assert [d.origin for d in first.trace.documents] == ["read", "read"]
        assert engine.metrics().misses == 2
        again = ask(engine)
        assert store.loads == []
        assert len(store.puts) == 2  # what is there is not written again
        assert all(cost > 0 for _, cost in store.puts)
        assert engine.metrics().decisions == {"recompute": 2}
        assert engine.metrics().hits == {}
    assert first.tokens == again.tokens
    assert [d.origin for d in again.trace.documents] == ["recomputed", "recomputed"]
    assert not any(d.is_hit for d in again.documents)
    assert all(d.choice.load_seconds > d.choice.recompute_seconds > 0 for d in again.trace.documents)
    assert "throttled" in again.trace.documents[0].choice.reason
    assert again.trace.full_prefill_seconds == pytest.approx(SPEED.seconds(0, again.usage.prompt_tokens))


def test_a_store_that_wins_is_loaded() -> None:
    store = Throttled(MemoryStore())
    with Engine(MODEL, store, costs=FAST) as engine:
        ask(engine)
        store.loads.clear()
        again = ask(engine)
    assert len(store.loads) == 2
    assert [d.origin for d in again.trace.documents] == ["throttled", "throttled"]
    assert [d.choice.recompute for d in again.trace.documents] == [False, False]


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_answers_do_not_depend_on_the_choice(tmp_path: Path, codec: str) -> None:
    found = {}
    for recompute in ("never", "always"):
        store = DiskStore(tmp_path / "store")
        with Engine(MODEL, store, codec=codec, recompute=recompute) as engine:
            answers = [ask(engine) for _ in range(2)]
            found[recompute] = answers[1]
            assert answers[0].tokens == answers[1].tokens
        assert len(list(DiskStore(tmp_path / "store").ids())) == 2
    assert [d.origin for d in found["never"].trace.documents] == ["disk", "disk"]
    assert [d.origin for d in found["always"].trace.documents] == ["recomputed", "recomputed"]
    assert found["never"].tokens == found["always"].tokens


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_rows_read_anew_are_those_of_the_store(tmp_path: Path, codec: str) -> None:
    texts = [MODEL.text.tokenize(text) for text in DOCUMENTS.values()]
    prefix = MODEL.text.tokenize(PREFIX, first=True)
    contexts = [(), texts[0]]  # the second one stands behind the first
    rows = {}
    for recompute in ("never", "always"):
        with Engine(MODEL, DiskStore(tmp_path / "store"), codec=codec, recompute=recompute) as engine:
            caches = engine._caches
            engine.call(lambda c=caches: c.documents(prefix, texts, contexts=contexts))
            both = engine.call(lambda c=caches: c.documents(prefix, texts, contexts=contexts))
            one = engine.call(lambda c=caches: c.documents(prefix, texts[1:], contexts=contexts[1:]))
            rows[recompute] = [x.kv for x in (*both, *one)]
            assert [x.is_hit for x in both] == [recompute == "never"] * 2
    for stored, anew in zip(rows["never"][:2], rows["always"][:2], strict=True):
        assert_same_rows(KV(stored.tokens, tuple(stored.layers)), anew)  # bit for bit: the same batch
    for stored, anew in zip(rows["never"][2].layers, rows["always"][2].layers, strict=True):
        tolerance = {"raw": 1e-5, "int8": 0.05}[codec]
        assert torch.allclose(stored.keys, anew.keys, atol=tolerance)
        assert torch.allclose(stored.values, anew.values, atol=tolerance)


def test_what_lies_in_memory_is_never_weighed() -> None:
    table = CostTable(SPEED, {"memory": Rate(1.0, 100.0)})
    with Engine(MODEL, MemoryStore(), costs=table) as engine:
        ask(engine)
        again = ask(engine)
    assert [d.origin for d in again.trace.documents] == ["memory", "memory"]
    assert again.trace.documents[0].num_bytes == 0


def test_without_a_store_everything_is_read() -> None:
    with Engine(MODEL) as engine:
        answer = ask(engine)
        assert engine.metrics().misses == 2
    assert [d.origin for d in answer.trace.documents] == ["read", "read"]
    assert json.loads(json.dumps(answer.trace.as_dict()))["documents"][0]["choice"]["recompute"] is False


# ---- what is measured


def test_speeds_are_measured_once_and_kept_beside_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with Engine(MODEL, folder) as engine:
        ask(engine)
        assert engine.costs.prefill is None  # so little was loaded that nobody had to know
        assert not (folder / FILE).exists()
        measured = engine.measure()
    assert measured.prefill is not None
    assert measured.tiers["disk"].bytes_per_second > 0
    assert measured.link is None
    assert not list(folder.glob("*.partial"))
    assert DiskStore(folder).check().ok
    with Engine(MODEL, folder) as engine:
        assert engine.costs.prefill is not None
        ask(engine)
        assert engine.costs.tiers["disk"] != measured.tiers["disk"]  # corrected by what happened
    with Engine(tiny(seed=1), folder) as engine:
        assert engine.costs.prefill is None  # another model


def test_a_damaged_file_of_speeds_is_as_none(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with Engine(MODEL, folder) as engine:
        ask(engine)
        engine.measure()
    for content in (b"{", b"[]", b"{}", (folder / FILE).read_bytes().replace(b'"tiers"', b'"tires"')):
        (folder / FILE).write_bytes(content)
        with Engine(MODEL, folder) as engine:
            assert engine.costs == CostTable()
            assert all(d.is_hit for d in ask(engine).documents)


def test_tables_survive_json() -> None:
    table = replace(SLOW, link=Rate(1e9, 1e-5))
    assert CostTable.from_dict(json.loads(json.dumps(table.as_dict()))) == table


def test_measuring_begins_where_loading_may_be_slow() -> None:
    speeds = Speeds(MODEL, MemoryStore())
    assert not speeds.are_wanted([Place("disk")], [1 << 20])
    assert speeds.are_wanted([Place("disk")], [1 << 24])
    assert speeds.are_wanted([Place("objects")], [1])
    assert not speeds.are_wanted([Place("memory", is_at_hand=True)], [1 << 30])
    assert not Speeds(MODEL, MemoryStore(), FAST).are_wanted([Place("objects")], [1 << 30])


def test_an_answer_measures_when_it_has_to() -> None:
    with Engine(MODEL, Throttled(MemoryStore())) as engine:
        ask(engine)  # from a place that nobody knows
        assert engine.costs.prefill is not None
        ask(engine)
        assert engine.costs.tiers["throttled"].bytes_per_second > 0  # of the first loads
        assert engine.costs.token_bytes > 0


def test_a_folder_that_cannot_be_written_is_not_measured(tmp_path: Path) -> None:
    assert disk_rate(tmp_path / "nowhere") is None
    assert link_rate(torch.device("cpu")) is None
    speed = prefill_speed(MODEL)
    assert speed.short[0] < speed.long[0] <= MODEL.max_length


def test_costs_of_encoding_reach_the_store(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    with Engine(MODEL, store) as engine:
        ask(engine)
        infos = list(store.entries())
    assert len(infos) == 2
    assert all(info.cost_seconds > 0 for info in infos)
    shares = sorted(info.cost_seconds / info.num_tokens for info in infos)
    assert shares[0] == pytest.approx(shares[1])
