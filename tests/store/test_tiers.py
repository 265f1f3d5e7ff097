import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.journal import Journal
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore, MemoryTier
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.faults import READS, WRITES, FaultyStore
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows


def bucket() -> str:
    return f"memory://{uuid.uuid4().hex}"


class TestDiskBeforeObjects(KVStoreContract):
    write = "through"

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"

    def make_store(self) -> KVStore:
        return TieredStore([DiskStore(self.folder), ObjectStore(bucket())], write=self.write)  # type: ignore[arg-type]


class TestDiskBeforeObjectsWrittenBack(TestDiskBeforeObjects):
    write = "back"


class TestMemoryBeforeObjects(KVStoreContract):
    def make_store(self) -> KVStore:
        return TieredStore([MemoryTier(4000), ObjectStore(bucket())])


class TestThreeTiers(TestDiskBeforeObjects):
    def make_store(self) -> KVStore:
        tiers = [MemoryTier(4000), DiskStore(self.folder), ObjectStore(bucket())]
        return TieredStore(tiers, write="back", copy_mapped=True)


class TestMemoryAlone(KVStoreContract):
    def make_store(self) -> KVStore:
        return TieredStore([MemoryTier(1 << 20)])


class TestNaiveStoresAsTiers(KVStoreContract):
    def make_store(self) -> KVStore:
        return TieredStore([MemoryStore(), MemoryStore()])


def key_of(number: int) -> EntryKey:
    return EntryKey(example_fingerprint(), (7, number))


def put(store: KVStore, number: int) -> EntryKey:
    key = key_of(number)
    store.put(key, example_rows(key.tokens))
    return key


def assert_has(store: KVStore, number: int) -> None:
    assert_same_rows(store.get(key_of(number)), example_rows((7, number)))


def assert_misses(store: KVStore, number: int) -> None:
    with pytest.raises(CacheMiss):
        store.get(key_of(number))


class Stack:
    """Disk before objects that can be made to fail."""

    def __init__(self, folder: Path, write: str = "through", url: str = "") -> None:
        self.url = url or bucket()
        self.disk = DiskStore(folder)
        self.objects = ObjectStore(self.url)
        self.lower = FaultyStore(self.objects, "objects")
        self.store = TieredStore([self.disk, self.lower], write=write, close_seconds=5)  # type: ignore[arg-type]

    def damage(self, number: int) -> None:
        key_id = key_of(number).id
        file = self.disk.path / key_id[:2] / f"{key_id}.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-60] ^= 1
        file.write_bytes(raw)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "store")
    yield stack
    stack.lower.failing = frozenset()
    stack.store.close()


@pytest.fixture
def back(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "store", "back")
    yield stack
    stack.lower.failing = frozenset()
    stack.lower.gate.set()
    stack.store.close()


# --- reading through ------------------------------------------------------------------------------


def test_a_hit_below_is_brought_up_as_the_same_bytes(stack: Stack) -> None:
    key = put(stack.store, 1)
    file = stack.disk.path / key.id[:2] / f"{key.id}.safetensors"
    before = file.read_bytes(), file.with_suffix(".json").read_bytes()
    stack.disk.delete(key.id)
    assert_has(stack.store, 1)
    assert (file.read_bytes(), file.with_suffix(".json").read_bytes()) == before
    assert_has(stack.disk, 1)
    assert_has(stack.store, 1)
    assert [(t.name, t.hits) for t in stack.store.tier_stats()] == [("disk", 1), ("objects", 1)]
    assert stack.store.stats().hits == 2


def test_coded_entries_are_never_encoded_again(stack: Stack) -> None:
    key = EntryKey(example_fingerprint(codec="fp8", rotations=(None, None)), (1, 2, 3))
    stack.store.put(key, example_rows(key.tokens))
    once = stack.store.get(key)
    stack.disk.delete(key.id)
    assert_same_rows(stack.store.get(key), once)


def test_damage_on_the_disk_is_mended_from_below(stack: Stack) -> None:
    put(stack.store, 1)
    stack.damage(1)
    assert_has(stack.store, 1)
    assert stack.store.stats().damaged == 1
    assert_has(stack.disk, 1)
    stack.damage(1)
    held = stack.store.get(key_of(1), by_layer=True)
    with pytest.raises(CacheMiss):
        tuple(held.layers)
    assert_same_rows(stack.store.get(key_of(1), by_layer=True), example_rows((7, 1)))


def test_damage_below_is_a_miss_and_reaches_no_disk(stack: Stack) -> None:
    key = put(stack.store, 1)
    stack.disk.delete(key.id)
    path = f"{stack.url}/{key.id[:2]}/{key.id}.kvrag"
    raw = bytearray(fsspec.filesystem("memory").cat_file(path))
    raw[-70] ^= 1
    fsspec.filesystem("memory").pipe_file(path, bytes(raw))
    assert_misses(stack.store, 1)
    assert key.id not in stack.disk
    assert key.id not in stack.objects
    assert stack.store.stats().damaged == 1
    put(stack.store, 1)
    assert_has(stack.objects, 1)


def test_a_full_disk_does_not_stop_reading(tmp_path: Path) -> None:
    upper = FaultyStore(DiskStore(tmp_path / "store"), "disk")
    objects = ObjectStore(bucket())
    store = TieredStore([upper, objects], state=tmp_path / "state.sqlite")
    put(store, 1)
    upper.store.delete(key_of(1).id)
    upper.failing = WRITES
    assert_has(store, 1)
    assert key_of(1) not in upper
    upper.failing = READS
    upper.raw = True
    assert_has(store, 1)
    store.close()


def test_mapped_rows_are_copied_into_main_memory_on_request_only(tmp_path: Path) -> None:
    for copy_mapped in (False, True):
        memory, disk = MemoryTier(1 << 20), DiskStore(tmp_path / str(copy_mapped))
        store = TieredStore([memory, disk], copy_mapped=copy_mapped)
        put(store, 1)
        assert_has(store, 1)
        assert (key_of(1) in memory) == copy_mapped
        store.close()


def test_memory_in_front_of_objects_saves_reading_them() -> None:
    objects = FaultyStore(ObjectStore(bucket()), "objects")
    store = TieredStore([MemoryTier(1 << 20), objects])
    put(store, 1)
    put(objects, 2)
    assert_has(store, 2)
    objects.failing = READS
    assert_has(store, 1)
    assert_has(store, 2)
    assert [(t.name, t.hits) for t in store.tier_stats()] == [("memory", 2), ("objects", 1)]


def test_entries_below_that_are_over_stay_there(stack: Stack) -> None:
    key = key_of(1)
    stack.objects.put(key, example_rows(key.tokens), ttl_seconds=1e-9)
    assert_misses(stack.store, 1)
    assert key not in stack.disk
    assert stack.objects.sweep() == (key.id,)
    assert key not in stack.objects


# --- writing through ------------------------------------------------------------------------------


def test_through_is_everywhere_or_nowhere(stack: Stack) -> None:
    put(stack.store, 1)
    assert key_of(1) in stack.disk
    assert key_of(1) in stack.objects
    for raw in (False, True):
        stack.lower.failing, stack.lower.raw = frozenset(["import_bytes"]), raw
        with pytest.raises(StoreWriteError):
            put(stack.store, 2)
        assert key_of(2) not in stack.disk
        with pytest.raises(StoreWriteError):
            put(stack.store, 1)
        assert_has(stack.disk, 1)


# --- writing back ---------------------------------------------------------------------------------


def test_back_is_uploaded_by_itself(back: Stack) -> None:
    put(back.store, 1)
    assert back.store.flush(10) == 0
    assert_has(back.objects, 1)
    assert back.store.tier_stats()[1].pending == 0


def test_what_could_not_be_uploaded_stays_pending(back: Stack, tmp_path: Path) -> None:
    back.lower.failing = WRITES
    for number in range(3):
        put(back.store, number)
    assert back.store.flush(10) == 3
    assert back.store.tier_stats()[1].pending == 3
    back.store.close()
    again = Stack(tmp_path / "store", "back", back.url)
    assert again.store.flush(10) == 0
    for number in range(3):
        assert_has(again.objects, number)
    again.store.close()


def test_close_does_not_wait_for_ever(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "store", "back")
    stack.store._close_seconds = 0.05
    stack.lower.gate.clear()
    put(stack.store, 1)
    stack.store.close()
    assert Journal(tmp_path / "store" / "tiers.sqlite").pending() == [(key_of(1).id, "objects")]
    stack.lower.gate.set()
    for thread in threading.enumerate():
        if thread.name == "kvrag-uploads":
            thread.join(10)
    stack.store.close()


def test_what_is_gone_or_damaged_is_not_uploaded(back: Stack) -> None:
    back.lower.failing = WRITES
    put(back.store, 1)
    put(back.store, 2)
    back.store.flush(10)
    back.disk.delete(key_of(1).id)
    back.damage(2)
    back.lower.failing = frozenset()
    assert back.store.flush(10) == 0
    assert not list(back.objects.ids())
    assert_misses(back.store, 2)


def test_deleting_cancels_uploads(back: Stack) -> None:
    back.lower.failing = frozenset(["import_bytes"])
    put(back.store, 1)
    back.store.flush(10)
    assert back.store.delete(key_of(1).id)
    back.lower.failing = frozenset()
    assert back.store.flush(10) == 0
    assert key_of(1) not in back.objects


WRITER = """
import sys
from kvrag.store.disk import DiskStore
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import example_fingerprint, example_rows

store = TieredStore([DiskStore(sys.argv[1]), ObjectStore(sys.argv[2])], write="back")
for number in range(10_000):
    key = EntryKey(example_fingerprint(), (7, number))
    store.put(key, example_rows(key.tokens))
    print(number, flush=True)
"""


@pytest.mark.parametrize("least", [1, 12])
def test_a_killed_writer_loses_no_upload(tmp_path: Path, least: int) -> None:
    folder, shared = tmp_path / "store", tmp_path / "shared"
    arguments = [sys.executable, "-c", WRITER, str(folder), shared.as_uri()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= least:
                break
        os.kill(child.pid, signal.SIGKILL)
    disk, objects = DiskStore(folder), ObjectStore(shared.as_uri())
    written = set(disk.ids())
    assert len(written) > least
    store = TieredStore([disk, objects], write="back")
    assert store.flush(60) == 0
    assert written <= set(objects.ids())
    assert not objects.check().damaged
    for number in range(least + 1):
        assert_has(objects, number)
    store.close()


# --- deleting -------------------------------------------------------------------------------------


def test_a_receipt_names_every_place(stack: Stack) -> None:
    key = put(stack.store, 1)
    receipt = stack.store.delete(key.id)
    assert receipt.existed
    assert {place.split(":")[0] for place in receipt.erased} == {"disk", "objects"}
    assert stack.url.removeprefix("memory://") in receipt.erased[-1]
    assert receipt.num_bytes > 2 * example_rows(key.tokens).num_bytes


@pytest.mark.parametrize("write", ["through", "back"])
def test_what_cannot_be_erased_does_not_come_back(tmp_path: Path, write: str) -> None:
    stack = Stack(tmp_path / "store", write)
    key = put(stack.store, 1)
    stack.store.flush(10)
    stack.lower.failing = frozenset(["delete"])
    with pytest.raises(StoreWriteError, match="objects"):
        stack.store.delete(key.id)
    assert key in stack.objects
    for store in (stack.store, TieredStore([stack.disk, stack.lower])):
        assert_misses(store, 1)
        assert key not in store
        assert not list(store.ids())
        assert not store.sweep()
    assert key not in stack.disk
    stack.lower.failing = frozenset()
    (receipt,) = stack.store.sweep()
    assert receipt
    assert key not in stack.objects
    assert_misses(stack.store, 1)
    put(stack.store, 1)
    assert_has(stack.store, 1)
    assert not stack.store.sweep(grace_seconds=0)
    assert_has(stack.store, 1)
    stack.store.close()


def test_put_again_is_there_again_although_it_could_not_be_erased(stack: Stack) -> None:
    key = put(stack.store, 1)
    stack.lower.failing = frozenset(["delete"])
    with pytest.raises(StoreWriteError):
        stack.store.delete(key.id)
    stack.lower.failing = frozenset(["import_bytes"])
    with pytest.raises(StoreWriteError):
        put(stack.store, 1)
    assert_misses(stack.store, 1)  # still deleted
    stack.lower.failing = frozenset()
    put(stack.store, 1)
    stack.store.sweep()
    assert_has(stack.store, 1)
    assert_has(stack.objects, 1)


def test_a_copy_under_way_is_no_entry_when_it_arrives(stack: Stack) -> None:
    key = put(stack.store, 1)
    stack.disk.delete(key.id)
    other = TieredStore([DiskStore(stack.disk.path), ObjectStore(stack.url)])  # as in another process
    stack.lower.gate.clear()
    found: list[object] = []

    def read() -> None:
        try:
            found.append(stack.store.get(key))
        except CacheMiss as miss:
            found.append(miss)

    reader = threading.Thread(target=read)
    reader.start()
    while "export_bytes" not in stack.lower.calls:
        time.sleep(0.001)
    entry = stack.objects.export_bytes(key.id)
    other.delete(key.id)
    stack.objects.import_bytes(entry)  # what the reader would have fetched in time
    stack.lower.gate.set()
    reader.join(10)
    assert isinstance(found[0], CacheMiss)
    assert key not in stack.disk


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path)
    with pytest.raises(ConfigError):
        TieredStore([])
    with pytest.raises(ConfigError):
        TieredStore([disk, disk])
    with pytest.raises(ConfigError, match="write"):
        TieredStore([disk], write="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bytes"):
        TieredStore([disk, MemoryStore()], write="back")
