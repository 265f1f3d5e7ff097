"""Documents that an engine loads ahead of its answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrag.config import Sampling
from kvrag.costs import CostTable, PrefillSpeed, Rate
from kvrag.engine import Engine
from kvrag.errors import ConfigError, GenerationCancelled
from kvrag.focus.policy import preset
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.stores import open_store
from kvrag.testing.models import tiny

MODEL = tiny()
PREFIX = "Read this.\n\n"
DOCUMENTS = {
    "lighthouse": "The lighthouse of Varn was built in 1871.",
    "ferry": "A ferry crosses the Mirrow twice a day.",
    "orchard": "The orchard at Lindal grows apples, pears and plums.",
}
PROMPT = PREFIX + "\n\n".join(DOCUMENTS.values()) + "\n\nWhy?"
SHORT = Sampling(max_new_tokens=4)


def ask(engine: Engine, **settings: Any) -> Any:
    stream = engine.stream_rendered(
        PROMPT, DOCUMENTS, prefix=PREFIX, sampling=SHORT, is_rendered=False, **settings
    )
    for _ in stream:
        pass
    return stream.answer


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store that has the documents."""
    with Engine(MODEL, tmp_path / "store") as engine:
        ask(engine)
    return tmp_path / "store"


def begin(engine: Engine, **settings: Any) -> Any:
    return engine.prefetch(DOCUMENTS, prefix=PREFIX, is_rendered=False, **settings)


def test_documents_are_loaded_before_the_answer_asks(folder: Path) -> None:
    store = DiskStore(folder)
    with Engine(MODEL, store) as engine:
        expected = ask(engine).tokens
    size = store.stats().bytes_read
    store = DiskStore(folder)
    with Engine(MODEL, store) as engine:
        ahead = begin(engine)
        until(lambda: store.stats().bytes_read == size)  # everything, and nobody has asked
        answer = ask(engine, ahead=ahead)
        assert store.stats().bytes_read == size
        found = engine.metrics()
    assert answer.tokens == expected
    assert all(d.is_prefetched for d in answer.trace.documents)
    assert (found.prefetch_started, found.prefetch_used, found.prefetch_cancelled) == (3, 3, 0)
    assert found.hits == {"disk": 3}


def test_rows_of_pruned_layers_are_not_read_ahead(folder: Path) -> None:
    store = DiskStore(folder)
    policy = preset("cachefocus")
    assert policy.pruning is not None
    layers = policy.pruning.first(MODEL.num_layers)
    assert layers < MODEL.num_layers
    with Engine(MODEL, store) as engine:
        ahead = begin(engine, policy=policy)
        rows = sum(len(MODEL.text.tokenize(text)) for text in DOCUMENTS.values()) * 2 * 2 * 16 * 4
        until(lambda: store.stats().bytes_read == layers * rows)
        time.sleep(0.02)
        assert store.stats().bytes_read == layers * rows
        answer = ask(engine, ahead=ahead, policy=policy)
        assert answer.usage.read_bytes == store.stats().bytes_read < answer.usage.cached_bytes


def test_reading_ahead_ends_with_the_answer_and_with_its_cancelling(folder: Path) -> None:
    for is_cancelled in (False, True):
        with Engine(MODEL, DiskStore(folder)) as engine:
            documents = engine._caches.reads._documents
            ahead = begin(engine)
            assert len(documents) == 3
            stream = engine.stream_rendered(
                PROMPT, DOCUMENTS, prefix=PREFIX, sampling=SHORT, is_rendered=False, ahead=ahead
            )
            if is_cancelled:
                engine.call(stream.cancel)
                with pytest.raises(GenerationCancelled):
                    list(stream)
                del stream, ahead
                gc.collect()
            else:
                list(stream)
            until(lambda held=documents: not held)


def test_who_lets_go_ends_it(folder: Path) -> None:
    with Engine(MODEL, DiskStore(folder)) as engine:
        documents = engine._caches.reads._documents
        with begin(engine):
            assert len(documents) == 3
        assert not documents
    with Engine(MODEL, DiskStore(folder)) as engine:
        documents = engine._caches.reads._documents
        ahead = begin(engine)
        assert len(documents) == 3
        del ahead
        gc.collect()
        assert not documents


def test_what_is_mapped_or_lost_or_slow_is_not_read_ahead(folder: Path) -> None:
    with Engine(MODEL, DiskStore(folder)) as engine:
        ask(engine)
        begin(engine)
        assert engine.metrics().prefetch_started == 0  # mapped
        engine.prefetch(["not there"], prefix=PREFIX)
        assert engine.metrics().prefetch_started == 0
    slow = CostTable(PrefillSpeed((64, 1e-4), (512, 1e-3)), {"disk": Rate(1e3, 1.0)})
    with Engine(MODEL, DiskStore(folder), costs=slow) as engine:
        begin(engine)
        assert engine.metrics().prefetch_started == 0
        assert {d.origin for d in ask(engine).trace.documents} == {"recomputed"}
    with Engine(MODEL, None) as engine:
        begin(engine).close()


def test_entries_can_be_named_by_their_keys(folder: Path) -> None:
    with Engine(MODEL, DiskStore(folder)) as engine:
        caches = engine._caches
        prefix = MODEL.text.tokenize(PREFIX, first=True)
        keys = [EntryKey(caches.fingerprint(prefix), MODEL.text.tokenize(t)) for t in DOCUMENTS.values()]
        with engine.prefetch(keys):
            assert engine.metrics().prefetch_started == 3


def test_what_is_deleted_meanwhile_is_not_handed_over(folder: Path) -> None:
    store = DiskStore(folder)
    with Engine(MODEL, store) as engine:
        ahead = begin(engine)
        until(lambda: all(d.opened.is_set() for d in engine._caches.reads._documents.values()))
        for key_id in list(store.ids()):
            assert store.delete(key_id)  # not through the engine
        answer = ask(engine, ahead=ahead)
    assert {d.origin for d in answer.trace.documents} == {"read"}


# ---- tiers by a few words


def test_a_folder_and_a_bucket_become_tiers(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    with Engine(MODEL, tmp_path / "store", objects=url, budget_bytes=1 << 30, memory_bytes=1 << 20) as engine:
        assert isinstance(engine.store, TieredStore)
        assert [t.name for t in engine.store.tier_stats()] == ["memory", "disk", "objects"]
        expected = ask(engine).tokens
        assert engine.store.flush() == 0
    with Engine(MODEL, tmp_path / "other", objects=url) as engine:  # another machine
        answer = ask(engine)
        assert [d.origin for d in answer.trace.documents] == ["objects"] * 3
        assert answer.tokens == expected
    with Engine(MODEL, objects=url, memory_bytes=1 << 20) as engine:
        assert [d.origin for d in ask(engine).trace.documents] == ["objects"] * 3
        assert [d.origin for d in ask(engine).trace.documents] == ["memory"] * 3
    with Engine(MODEL, objects=url) as engine:
        assert isinstance(engine.store, ObjectStore)
        answer = ask(engine)
        assert answer.tokens == expected
        assert answer.usage.read_bytes == answer.usage.cached_bytes > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"budget_bytes": 1},
        {"store": MemoryStore(), "budget_bytes": 1},
        {"memory_bytes": 1},
        {"store": MemoryStore(), "memory_bytes": -1},
    ],
    ids=["no folder", "not a folder", "nothing behind", "negative"],
)
def test_tiers_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        open_store(settings.pop("store", None), **settings)


def test_layers_of_objects_are_under_way_before_they_are_touched(tmp_path: Path) -> None:
    store = ObjectStore(f"file://{tmp_path}")
    with Engine(MODEL, store) as engine:
        ask(engine)
        key = EntryKey(
            engine._caches.fingerprint(MODEL.text.tokenize(PREFIX, first=True)),
            MODEL.text.tokenize(DOCUMENTS["ferry"]),
        )
        kv = store.get(key, by_layer=True)
        assert kv.num_bytes_touched == 0
        kv.read_soon(0)
        until(lambda: kv.num_bytes_touched == kv.num_bytes)
        assert kv.seconds_touched > 0
