import ctypes
import errno
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvrag.errors import CacheMiss
from kvrag.segments import KV, LazyLayers
from kvrag.store import layout
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

TOKENS = (3, 1, 4, 1, 5)
SHAPES = ((2, 8, 8), (1, 8, 6), (2, 8, 8), (3, 4, 4))
KEY = EntryKey(example_fingerprint(), TOKENS)
ROWS = example_rows(TOKENS, shapes=SHAPES)
SIZES = [layer.num_bytes for layer in ROWS.layers]


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    """A store with one entry of four layers."""
    store = DiskStore(tmp_path / "store")
    store.put(KEY, ROWS)
    return store


def data_file(store: DiskStore, key: EntryKey = KEY) -> Path:
    return store.path / key.id[:2] / f"{key.id}.safetensors"


def spans(store: DiskStore, key: EntryKey = KEY) -> list[tuple[int, int]]:
    manifest = layout.parse_manifest(data_file(store, key).with_suffix(".json").read_bytes())
    return list(manifest.layer_spans())


def damage(store: DiskStore, layer: int) -> None:
    """Flip a bit in the middle of a layer."""
    raw = bytearray(data_file(store).read_bytes())
    raw[sum(spans(store)[layer]) // 2] ^= 16
    data_file(store).write_bytes(raw)


def assert_layers(kv: KV, numbers: range) -> None:
    """These layers, touched in this order, are those that were put."""
    found, expected = (tuple(x.layers[i] for i in numbers) for x in (kv, ROWS))
    assert_same_rows(KV(TOKENS, found), KV(TOKENS, expected))


def assert_missing(store: DiskStore, kv: KV, layer: int) -> None:
    with pytest.raises(CacheMiss):
        kv.layers[layer]
    assert KEY not in store
    assert list((store.path / "quarantine").glob(f"{KEY.id}.*"))


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(4))
def test_damage_is_noticed_when_its_layer_is_touched_and_not_before(store: DiskStore, layer: int) -> None:
    damage(store, layer)
    store = DiskStore(store.path)
    kv = store.get(KEY, by_layer=True)
    assert_layers(kv, range(layer))
    assert_layers(kv, range(3, layer, -1))
    assert (store.stats().hits, store.stats().misses, store.stats().damaged) == (1, 0, 0)
    assert KEY in store
    assert_missing(store, kv, layer)
    assert (store.stats().misses, store.stats().damaged) == (1, 1)
    for by_layer in (True, False):
        with pytest.raises(CacheMiss):
            store.get(KEY, by_layer=by_layer)
    assert (store.stats().hits, store.stats().misses, store.stats().damaged) == (1, 3, 1)
    with pytest.raises(CacheMiss):
        kv.layers[layer]  # still not handed out, and not damaged twice
    assert store.stats().damaged == 1
    assert_layers(kv, range(layer))  # what was proven, stays so
    store.put(KEY, ROWS)
    assert_same_rows(store.get(KEY, by_layer=True), ROWS)
    with pytest.raises(CacheMiss):
        tuple(kv.layers)  # rows of the old file
    assert KEY in store


@pytest.mark.parametrize("touch", ["slice", "iteration", "head", "to", "negative"])
def test_every_way_to_touch_verifies(store: DiskStore, touch: str) -> None:
    damage(store, 3)
    kv = DiskStore(store.path).get(KEY, by_layer=True)
    kv.layers[0:3]
    head, sizes = kv.head(2), (kv.num_bytes, kv.num_tokens, len(kv.layers), kv.device)
    assert sizes == (sum(SIZES), 5, 4, torch.device("cpu"))
    assert kv.to(torch.device("cpu")) is kv
    assert head.layers[2].num_tokens == 2
    ways: dict[str, Callable[[], object]] = {
        "slice": lambda: kv.layers[2:],
        "iteration": lambda: list(kv.layers),
        "head": lambda: head.layers[3],
        "to": lambda: kv.to(torch.device("meta")),
        "negative": lambda: kv.layers[-1],
    }
    with pytest.raises(CacheMiss):
        ways[touch]()
    assert KEY not in store


@pytest.mark.parametrize("where", ["header", "tokens", "size", "manifest"])
def test_what_lies_around_the_rows_is_verified_at_once(store: DiskStore, where: str) -> None:
    file = data_file(store).with_suffix(".json") if where == "manifest" else data_file(store)
    raw = bytearray(file.read_bytes())
    if where == "size":
        raw.append(0)
    else:
        raw[{"header": 20, "tokens": -1, "manifest": 20}[where]] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CacheMiss):
        store.get(KEY, by_layer=True)
    assert store.stats().damaged == 1
    assert KEY not in store


def test_other_ways_in_find_the_damage_that_nobody_touched(store: DiskStore) -> None:
    damage(store, 2)
    store = DiskStore(store.path)
    kv = store.get(KEY, by_layer=True)
    assert_layers(kv, range(2))
    assert store.check().damaged == (KEY.id,)
    with pytest.raises(CacheMiss):
        store.get(KEY)  # all at once: an entry proven in part is not enough
    assert store.stats().damaged == 1
    with pytest.raises(CacheMiss):
        kv.layers[2]
    assert store.stats().damaged == 1


def test_starting_over_ends_on_a_read_only_store(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(store, 2)
    store = DiskStore(store.path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    kv = store.get(KEY, by_layer=True)
    with monkeypatch.context() as patch:
        patch.setattr("kvrag.store.folder.exclusive", refuse)
        for _ in range(2):
            with pytest.raises(CacheMiss):
                kv.layers[2]
            with pytest.raises(CacheMiss):
                store.get(KEY, by_layer=True)
    assert store.stats().damaged == 1
    store.put(KEY, ROWS)
    assert_same_rows(store.get(KEY, by_layer=True), ROWS)


def test_a_replaced_entry_is_not_set_aside_for_its_predecessor(store: DiskStore) -> None:
    damage(store, 1)
    store = DiskStore(store.path)
    kv = store.get(KEY, by_layer=True)
    store.delete(KEY.id)
    store.put(KEY, ROWS)
    with pytest.raises(CacheMiss):
        kv.layers[1]
    assert (store.stats().misses, store.stats().damaged) == (1, 0)
    assert_same_rows(store.get(KEY), ROWS)


def test_verify_never_checks_no_rows_but_is_lazy(store: DiskStore) -> None:
    damage(store, 1)
    store = DiskStore(store.path, verify="never")
    kv = store.get(KEY, by_layer=True)
    assert isinstance(kv.layers, LazyLayers)
    assert kv.num_bytes_touched == 0
    kv.layers[1]
    assert kv.num_bytes_touched == SIZES[1] == store.stats().bytes_read
    assert_layers(kv, range(1))
    assert store.stats().damaged == 0


# --- counting and keeping -----------------------------------------------------------------------


def test_bytes_are_counted_when_they_are_read(store: DiskStore) -> None:
    store = DiskStore(store.path)
    kv = store.get(KEY, by_layer=True)
    half = kv.head(3)
    assert (kv.num_bytes, kv.num_bytes_touched, store.stats().bytes_read) == (sum(SIZES), 0, 0)
    for _ in range(2):
        assert kv.layers[1].num_bytes == SIZES[1]
        assert kv.num_bytes_touched == store.stats().bytes_read == SIZES[1]
    assert half.num_bytes_touched == half.layers[1].num_bytes == ROWS.head(3).layers[1].num_bytes
    assert half.num_bytes == half.head(7).num_bytes == ROWS.head(3).num_bytes
    half.layers[2]
    assert kv.num_bytes_touched == store.stats().bytes_read == SIZES[1] + SIZES[2]
    assert ROWS.num_bytes_touched == ROWS.num_bytes


def test_loads_at_once_count_all_bytes_and_kept_ones_none(store: DiskStore) -> None:
    store = DiskStore(store.path)
    for _ in range(2):
        assert store.get(KEY).num_bytes_touched == sum(SIZES)
        assert store.stats().bytes_read == sum(SIZES)
    assert store.get(KEY, by_layer=True).num_bytes_touched == sum(SIZES)
    assert store.stats().bytes_read == sum(SIZES)


def test_layers_are_proven_once_and_then_kept(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store, proven = DiskStore(store.path), []
    original = layout.verify_layer

    def count(data: torch.Tensor, manifest: layout.Manifest, number: int, span: tuple[int, int]) -> None:
        proven.append(number)
        original(data, manifest, number, span)

    monkeypatch.setattr("kvrag.store.layout.verify_layer", count)
    first = store.get(KEY, by_layer=True)
    assert_layers(first, range(2))
    second = store.get(KEY, by_layer=True)
    assert second.num_bytes_touched == sum(SIZES[:2])
    assert_layers(second, range(4))
    assert_same_rows(first, ROWS)
    assert proven == [0, 1, 2, 3]
    whole = store.get(KEY)
    assert isinstance(whole.layers, tuple)
    assert whole.layers[3].keys.data_ptr() == first.layers[3].keys.data_ptr()
    assert store.get(KEY, by_layer=True) is whole
    assert store.stats().bytes_read == sum(SIZES)
    assert proven == [0, 1, 2, 3]


def test_a_store_that_keeps_nothing_proves_again(store: DiskStore) -> None:
    store = DiskStore(store.path, keep_bytes=0)
    for number in range(1, 3):
        assert_same_rows(store.get(KEY, by_layer=True), ROWS)
        assert store.stats().bytes_read == number * sum(SIZES)


def test_an_entry_that_is_gone_is_not_kept_by_its_last_layer(store: DiskStore) -> None:
    store = DiskStore(store.path)
    kv = store.get(KEY, by_layer=True)
    DiskStore(store.path).delete(KEY.id)
    assert_same_rows(kv, ROWS)
    with pytest.raises(CacheMiss):
        store.get(KEY, by_layer=True)


def test_threads_that_touch_one_layer_count_it_once(store: DiskStore) -> None:
    store = DiskStore(store.path)
    kv, start = store.get(KEY, by_layer=True), threading.Barrier(4)

    def touch() -> None:
        start.wait()
        assert_same_rows(kv, ROWS)

    threads = [threading.Thread(target=touch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kv.num_bytes_touched == store.stats().bytes_read == sum(SIZES)


# --- what the operating system reads ------------------------------------------------------------

BIG = EntryKey(example_fingerprint(), tuple(range(1024)))
BIG_LAYER = 4 << 20


@pytest.fixture
def big(tmp_path: Path) -> DiskStore:
    """A store with one entry of eight layers of 4 MiB."""
    store = DiskStore(tmp_path / "big")
    store.put(BIG, example_rows(BIG.tokens, shapes=((4, 128, 128),) * 8))
    return DiskStore(store.path)


def mapped_bytes(path: Path) -> int:
    """Bytes of the file's mappings that this process has touched, in its own page tables."""
    found = 0
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(path) in part.splitlines()[0]:
            found += 1024 * sum(map(int, re.findall(r"^Rss:\s+(\d+) kB", part, re.MULTILINE)))
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_untouched_layers_are_not_mapped_in(big: DiskStore) -> None:
    path = data_file(big, BIG)
    kv = big.get(BIG, by_layer=True)
    around = 3 * (2 << 20)  # the kernel maps up to 2 MiB around a byte if the page cache has them in a piece
    assert 0 < mapped_bytes(path) <= around
    for number in (0, 1):
        kv.layers[number].keys.sum()
        assert (number + 1) * BIG_LAYER <= mapped_bytes(path) <= (number + 1) * BIG_LAYER + around
    kv.head(3)
    assert kv.num_bytes == 8 * BIG_LAYER
    assert mapped_bytes(path) <= 2 * BIG_LAYER + around


def resident(path: Path) -> Iterator[bool]:
    """Which pages of a file the operating system holds in memory, by mincore."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        view = (ctypes.c_ubyte * size).from_buffer(mapped)
        rc = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages
        )
        del view
    if rc != 0:
        pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
    return (bool(page & 1) for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' posix_fadvise and mincore")
def test_untouched_layers_are_not_read_from_the_disk(big: DiskStore) -> None:
    path, places = data_file(big, BIG), spans(big, BIG)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(path)):
        pytest.skip("this file system does not let go of its pages")

    def shares() -> list[float]:
        """How much of every layer is in memory, but for the pages that it shares with its neighbours."""
        pages = list(resident(path))
        inner = [pages[-(-start // mmap.PAGESIZE) : end // mmap.PAGESIZE] for start, end in places]
        return [sum(part) / len(part) for part in inner]

    kv = big.get(BIG, by_layer=True)
    assert shares() == [0] * 8
    for number in (0, 1, 4):
        kv.layers[number]
    assert shares() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert big.stats().bytes_read == 3 * BIG_LAYER
    big.get(BIG)
    assert shares() == [1] * 8
