"""Where entries lie, among tiers and while they are read ahead."""

from __future__ import annotations

import threading
from pathlib import Path

from kvrag.segments import LayerKV
from kvrag.store.disk import DiskStore
from kvrag.store.found import MAPPED, Place, counts_of, find, locate
from kvrag.store.key import EntryKey
from kvrag.store.lazy import FetchedLayers
from kvrag.store.memory import MemoryTier
from kvrag.store.objects import ObjectStore
from kvrag.store.prefetch import Prefetch
from kvrag.store.tiers import TieredStore
from kvrag.testing.faults import FaultyStore
from kvrag.testing.stores import example_fingerprint, example_rows

KEY = EntryKey(example_fingerprint(), (1, 2, 3))
ROWS = example_rows(KEY.tokens)


def test_a_file_is_mapped_once_all_of_it_was_read(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.put(KEY, ROWS)
    size = sum(file.stat().st_size for file in store.files_of(KEY.id))
    assert locate(store, KEY) == Place("disk", size)
    lazy = find(store, KEY, by_layer=True)
    assert (lazy.tier, lazy.num_bytes) == ("disk", 0)
    lazy.kv.layers[0]
    assert 0 < lazy.num_bytes < ROWS.num_bytes
    assert lazy.seconds_spent > lazy.seconds
    assert locate(store, KEY) == Place("disk", size)  # the rest is not read
    again = find(store, KEY, by_layer=True)
    assert again.tier == "disk"
    tuple(again.kv.layers)
    assert again.num_bytes + ROWS.layers[0].num_bytes == ROWS.num_bytes  # the first layer was there
    assert locate(store, KEY) == Place(MAPPED, size, is_at_hand=True)
    assert find(store, KEY).tier == MAPPED
    assert find(store, KEY).num_bytes == 0


def test_the_first_tier_that_has_it(tmp_path: Path) -> None:
    memory, disk, objects = (
        MemoryTier(1 << 20),
        DiskStore(tmp_path / "a"),
        ObjectStore(f"file://{tmp_path}/b"),
    )
    tiers = TieredStore([memory, disk, objects], copy_mapped=True)
    assert locate(tiers, KEY) == Place("objects", is_certain=False)
    tiers.put(KEY, ROWS)
    assert (found := locate(tiers, KEY)) is not None
    assert found == Place("memory", is_at_hand=True)
    assert find(tiers, KEY).tier == "memory"
    memory.delete(KEY.id)
    assert find(tiers, KEY).tier == "disk"
    memory.delete(KEY.id)
    disk.delete(KEY.id)
    assert find(tiers, KEY).tier == "objects"
    assert find(tiers, KEY).tier in ("memory", MAPPED, "disk")  # brought up
    tiers.delete(KEY.id)
    assert locate(tiers, KEY) is None  # known to be erased
    tiers.close()


def test_a_store_that_does_not_say_is_presumed_to_have_everything() -> None:
    store = FaultyStore(MemoryTier(1 << 20), "odd")
    assert locate(store, KEY) == Place("odd", is_certain=False)
    assert counts_of(store) == {}


def test_what_is_read_ahead_is_at_hand(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.put(KEY, ROWS)
    prefetch = Prefetch(store)
    assert locate(prefetch, KEY) == locate(store, KEY)
    with prefetch.start([KEY]):
        assert (place := locate(prefetch, KEY)) is not None
        assert place.is_at_hand
        assert find(prefetch, KEY).is_prefetched
        assert counts_of(prefetch)["prefetch_used"] == 1
        store.delete(KEY.id)
        assert locate(prefetch, KEY) is None
    prefetch.close()


def test_several_layers_are_fetched_at_once_and_each_once() -> None:
    """The first layers wait for each other: one after the other they would never come."""
    together = threading.Barrier(3, timeout=30)
    fetched: list[int] = []
    done = threading.Event()

    def load(number: int) -> LayerKV:
        fetched.append(number)
        if number < 3:
            together.wait()
        if len(fetched) == 4:
            done.set()
        return ROWS.layers[number % len(ROWS.layers)]

    layers = FetchedLayers(3, [100] * 6, load, ahead=3)
    layers.read_soon(0)
    layers.read_soon(0)
    for number in range(3):
        layers.touch(number)
    layers.read_soon(3)
    layers.touch(3)
    assert done.wait(30)
    assert sorted(fetched)[:4] == [0, 1, 2, 3]
    tuple(layers)
    assert sorted(fetched) == [0, 1, 2, 3, 4, 5]
    assert layers.num_bytes_touched == 600
