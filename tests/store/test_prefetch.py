import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kvrag.errors import CacheMiss, ConfigError
from kvrag.segments import KV, LayerKV
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.lazy import MappedLayers
from kvrag.store.memory import MemoryStore
from kvrag.store.prefetch import Prefetch
from kvrag.testing.faults import READS, FaultyStore
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

SHAPES = ((1, 8, 8),) * 4


class TestPrefetch(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"

    def make_store(self) -> KVStore:
        return Prefetch(DiskStore(self.folder))


class SlowStore(MemoryStore):
    """Layers that wait for permission, and write down who was touched."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[tuple[int, int]] = []
        self.opened: list[int] = []
        self.gate = threading.Semaphore(0)
        self.broken: set[tuple[int, int]] = set()

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        kv = super().get(key)
        number = key.tokens[1]
        self.opened.append(number)

        def touch(layer: int) -> LayerKV:
            self.gate.acquire()
            self.touched.append((layer, number))
            if (layer, number) in self.broken:
                raise CacheMiss("damaged")
            return kv.layers[layer]

        sizes = [layer.num_bytes for layer in kv.layers]
        return KV(key.tokens, MappedLayers(2, sizes, touch, lambda: None, lambda _: None))


@pytest.fixture
def slow() -> Iterator[SlowStore]:
    store = SlowStore()
    yield store
    store.gate.release(1000)


def key_of(number: int) -> EntryKey:
    return EntryKey(example_fingerprint(), (7, number))


def put(store: KVStore, numbers: range) -> list[EntryKey]:
    keys = [key_of(number) for number in numbers]
    for key in keys:
        store.put(key, example_rows(key.tokens, shapes=SHAPES))
    return keys


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_layer_by_layer_across_documents(slow: SlowStore) -> None:
    keys = put(slow, range(3))
    prefetch = Prefetch(slow, threads=1)
    fetch = prefetch.start(keys, num_layers=3)
    slow.gate.release(9)
    until(lambda: len(slow.touched) == 9)
    assert slow.opened == [0, 1, 2]
    assert slow.touched == [(layer, number) for layer in range(3) for number in range(3)]
    held = prefetch.get(keys[1], by_layer=True)
    assert held.num_bytes_touched == 3 * held.num_bytes // 4
    assert slow.stats().hits == 3  # not loaded again
    more = prefetch.start(keys[1:2])  # wants the rest, too
    slow.gate.release(1)
    until(lambda: held.num_bytes_touched == held.num_bytes)
    assert slow.touched[9:] == [(3, 1)]
    fetch.close()
    more.close()
    prefetch.close()


def test_several_requests_read_a_document_once(slow: SlowStore) -> None:
    (key,) = put(slow, range(1))
    prefetch = Prefetch(slow, threads=2)
    first, second = prefetch.start([key]), prefetch.start([key, key])
    until(lambda: bool(slow.opened))
    first.close()  # the second still wants it
    slow.gate.release(4)
    until(lambda: len(slow.touched) == 4)
    assert_same_rows(prefetch.get(key), example_rows(key.tokens, shapes=SHAPES))
    assert slow.opened == [0]
    second.close()
    slow.gate.release(4)
    prefetch.get(key)
    assert slow.opened == [0, 0]  # nobody wants it ahead any more
    prefetch.close()


def test_what_is_not_needed_is_not_read(slow: SlowStore) -> None:
    keys = put(slow, range(3))
    prefetch = Prefetch(slow, threads=1)
    with prefetch.start(keys) as fetch:
        until(lambda: len(slow.opened) == 3)
        fetch.drop(keys[0], from_layer=2)
        fetch.drop(keys[1])
        fetch.drop(key_of(9))
        slow.gate.release(12)
        until(lambda: len([t for t in slow.touched if t[1] == 2]) == 4)
        assert [layer for layer, number in slow.touched if number == 0] == [0, 1]
        assert len([t for t in slow.touched if t[1] == 1]) <= 1  # the one under way
    prefetch.close()


def test_cancelled_before_it_began(slow: SlowStore) -> None:
    keys = put(slow, range(2))
    prefetch = Prefetch(slow, threads=1)
    busy = prefetch.start(keys[:1])
    until(lambda: slow.opened == [0])
    time.sleep(0.01)
    prefetch.start(keys[1:]).close()
    slow.gate.release(8)
    until(lambda: len(slow.touched) == 4)
    assert_same_rows(prefetch.get(keys[1]), example_rows(keys[1].tokens, shapes=SHAPES))
    busy.close()
    prefetch.close()
    assert len([t for t in slow.touched if t[1] == 1]) == 4
    assert slow.opened.count(1) <= 2


def test_bytes_read_ahead_are_bounded(slow: SlowStore) -> None:
    keys = put(slow, range(4))
    layer_bytes = slow.get(keys[0]).num_bytes // 4
    slow.opened.clear()
    prefetch = Prefetch(slow, threads=1, max_bytes=5 * layer_bytes)
    fetch = prefetch.start(keys)
    slow.gate.release(100)
    until(lambda: len(slow.touched) == 5)
    time.sleep(0.02)
    assert len(slow.touched) == 5
    for key in keys:  # nobody has to wait for room
        assert_same_rows(prefetch.get(key), example_rows(key.tokens, shapes=SHAPES))
    other = prefetch.start(put(slow, range(10, 11)))
    assert_same_rows(prefetch.get(key_of(10)), example_rows((7, 10), shapes=SHAPES))
    fetch.close()
    other.close()
    prefetch.close()


def test_documents_read_ahead_are_bounded(slow: SlowStore) -> None:
    keys = put(slow, range(4))
    prefetch = Prefetch(slow, max_documents=2)
    fetch = prefetch.start(keys)
    slow.gate.release(16)
    for key in keys:
        assert_same_rows(prefetch.get(key), example_rows(key.tokens, shapes=SHAPES))
    assert sorted(slow.opened) == [0, 1, 2, 3]
    fetch.close()
    prefetch.close()


@pytest.mark.parametrize("raw", [False, True])
def test_failures_become_misses_and_lose_no_thread(tmp_path: Path, raw: bool) -> None:
    faulty = FaultyStore(DiskStore(tmp_path / "store"))
    keys = put(faulty, range(2))
    prefetch = Prefetch(faulty, threads=1)
    faulty.failing, faulty.raw = READS, raw
    fetch = prefetch.start(keys)
    until(lambda: faulty.calls.count("get") == 2)
    for key in keys:
        with pytest.raises(CacheMiss):
            prefetch.get(key)
    faulty.failing = frozenset()
    for key in keys:
        assert_same_rows(prefetch.get(key), example_rows(key.tokens, shapes=SHAPES))
    with prefetch.start(keys):
        until(lambda: faulty.calls.count("get") == 6)  # by the same thread
    fetch.close()
    prefetch.close()


def test_a_damaged_layer_is_a_miss_for_who_touches_it(slow: SlowStore) -> None:
    (key,) = put(slow, range(1))
    slow.broken = {(1, 0)}
    slow.gate.release(100)
    prefetch = Prefetch(slow, threads=1)
    with prefetch.start([key]):
        until(lambda: (1, 0) in slow.touched)
        held = prefetch.get(key, by_layer=True)
        assert_same_rows(
            KV(key.tokens, held.layers[:1]), KV(key.tokens, example_rows((7, 0), shapes=SHAPES).layers[:1])
        )
        with pytest.raises(CacheMiss):
            held.layers[1]
    prefetch.close()


def test_what_was_put_or_deleted_meanwhile(slow: SlowStore) -> None:
    slow.gate.release(1000)
    prefetch = Prefetch(slow, threads=1)
    key = key_of(0)
    with prefetch.start([key]):
        until(lambda: slow.stats().misses == 1)
        put(prefetch, range(1))
        assert_same_rows(prefetch.get(key), example_rows(key.tokens, shapes=SHAPES))
    with prefetch.start([key]):
        assert prefetch.delete(key.id)
        with pytest.raises(CacheMiss):
            prefetch.get(key)
    prefetch.close()


def test_many_threads_that_read_ahead_what_others_delete(tmp_path: Path) -> None:
    prefetch = Prefetch(DiskStore(tmp_path / "store"), threads=3, max_documents=4, max_bytes=5000)

    def work(number: int) -> None:
        keys = [key_of(number % 3), key_of((number + 1) % 3)]
        with prefetch.start(keys, num_layers=number % 5) as fetch:
            fetch.drop(keys[0], from_layer=number % 2)
            if number % 4 == 0:
                prefetch.delete(keys[0].id)
            else:
                prefetch.put(keys[0], example_rows(keys[0].tokens, shapes=SHAPES))
            for key in keys:
                with suppress(CacheMiss):
                    found = prefetch.get(key, by_layer=number % 2 == 0)
                    assert_same_rows(found, example_rows(key.tokens, shapes=SHAPES))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(80)))
    assert prefetch.check().ok
    prefetch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvrag-prefetch")]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError):
        Prefetch(MemoryStore(), threads=0)
