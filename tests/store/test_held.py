"""Write-back before a small disk: what waits for its upload is not evicted, whoever needs the room."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvrag.errors import CacheMiss, StoreWriteError, UploadsPending
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.journal import Journal
from kvrag.store.key import EntryKey
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.faults import WRITES, FaultyStore
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows


def key_of(number: int) -> EntryKey:
    return EntryKey(example_fingerprint(), (7, number))


def put(store: KVStore, *numbers: int) -> None:
    for number in numbers:
        store.put(key_of(number), example_rows((7, number)))


def there(store: KVStore, most: int = 40) -> list[int]:
    """Numbers of the entries that a store gives, to the bit."""
    found = []
    for number in range(most):
        try:
            assert_same_rows(store.get(key_of(number)), example_rows((7, number)))
        except CacheMiss:
            continue
        found.append(number)
    return found


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of one entry."""
    store = DiskStore(tmp_path_factory.mktemp("one"))
    put(store, 0)
    return store.stats().num_bytes


Open = Callable[..., TieredStore]


class Machine:
    """A folder with room for three entries, and a bucket that can be out of reach."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.below = FaultyStore(ObjectStore((folder / "bucket").as_uri()), name="objects")

    def disk(self, entries: float = 3.5) -> DiskStore:
        return DiskStore(self.folder / "disk", budget_bytes=int(entries * self.size))

    def tiers(self, entries: float = 3.5, close_seconds: float = 10.0) -> TieredStore:
        return TieredStore([self.disk(entries), self.below], write="back", close_seconds=close_seconds)


@pytest.fixture
def machine(tmp_path: Path, size: int) -> Iterator[Machine]:
    made = Machine(tmp_path, size)
    yield made
    made.below.gate.set()


def test_what_is_not_uploaded_is_not_evicted(machine: Machine) -> None:
    machine.below.failing = WRITES
    store = machine.tiers(close_seconds=0.2)
    put(store, 0, 1, 2)
    with pytest.raises(UploadsPending, match=r"has not been uploaded yet.*flush"):
        put(store, 3)
    assert there(store) == [0, 1, 2]
    assert store.stats().evictions == 0
    assert store.stats().write_failures > 0
    assert machine.disk().held() == sorted(key_of(n).id for n in range(3))
    machine.below.failing = frozenset()
    assert store.flush() == 0
    put(store, 3, 4)
    store.flush()
    assert there(machine.below.store) == [0, 1, 2, 3, 4]
    assert there(machine.disk())[-2:] == [3, 4]
    assert machine.disk().held() == []
    assert store.stats().evictions == 2
    store.close()


def test_put_waits_for_uploads_where_that_helps(machine: Machine) -> None:
    """Entries come faster than the bucket takes them, the folder holds three: none is lost or refused."""
    machine.below.gate.clear()
    store = machine.tiers(close_seconds=60.0)
    put(store, 0, 1, 2)
    writer = threading.Thread(target=put, args=(store, *range(3, 20)))
    writer.start()
    machine.below.gate.set()
    writer.join(60.0)
    assert not writer.is_alive()
    assert store.flush() == 0
    assert there(machine.below.store) == list(range(20))
    assert machine.disk().stats().num_bytes <= 3.5 * machine.size
    store.close()


def test_an_entry_that_does_not_fit_leaves_nothing_pending(machine: Machine) -> None:
    machine.below.failing = WRITES
    store = machine.tiers(close_seconds=0.0)
    put(store, 0, 1, 2)
    with pytest.raises(UploadsPending):
        put(store, 3)
    assert {key_id for key_id, _ in Journal(machine.folder / "disk" / "tiers.sqlite").pending()} == {
        key_of(n).id for n in range(3)
    }
    assert key_of(3).id not in machine.disk().held()
    store.close()


def test_others_who_write_to_the_folder_evict_nothing_of_it(machine: Machine) -> None:
    """After a restart, and without the bucket: a hold is a file, and everybody heeds it."""
    machine.below.failing = WRITES
    store = machine.tiers(close_seconds=0.1)
    put(store, 0, 1)
    store.close()
    alone = machine.disk()
    put(alone, 2, 3, 4, 5)
    assert there(alone)[:2] == [0, 1]
    assert len(there(alone)) == 3
    machine.disk(entries=1.5).sweep()
    assert there(machine.disk()) == [0, 1]
    machine.below.failing = frozenset()
    again = machine.tiers(entries=1.5)
    assert again.flush() == 0
    assert there(machine.below.store) == [0, 1]
    again.sweep()
    assert len(there(machine.disk())) == 1
    again.close()


def test_what_is_pending_without_a_hold_is_held_at_the_next_start(machine: Machine) -> None:
    """As after a crash between the two, or in a folder of an earlier version."""
    machine.below.failing = WRITES
    store = machine.tiers(close_seconds=0.0)
    put(store, 0, 1)
    store.close()
    disk = machine.disk()
    disk.release(disk.held())
    again = machine.tiers(close_seconds=0.0)
    assert disk.held() == sorted(key_of(n).id for n in range(2))
    again.close()


def test_holds_that_nothing_waits_for_are_swept(machine: Machine) -> None:
    store = machine.tiers()
    put(store, 0)
    store.flush()
    machine.disk().hold([key_of(0).id, key_of(9).id, "../x"])
    assert len(machine.disk().held()) == 2
    store.sweep()
    assert machine.disk().held() == []
    store.close()


def test_deleting_and_expiring_let_go(machine: Machine) -> None:
    machine.below.failing = frozenset(["import_bytes"])
    store = machine.tiers(close_seconds=0.0)
    put(store, 0)
    receipt = store.delete(key_of(0).id)
    assert f"disk: {key_of(0).id[:2]}/{key_of(0).id}.held" in receipt.erased
    store.put(key_of(1), example_rows((7, 1)), ttl_seconds=1e-6)
    machine.disk().sweep()
    assert machine.disk().held() == []
    store.close()


def test_damage_before_the_upload_lets_go(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    machine.below.failing = WRITES
    store = machine.tiers()
    put(store, 0)
    store.flush()
    machine.disk().files_of(key_of(0).id)[1].write_bytes(b"x")
    machine.below.failing = frozenset()
    assert store.flush() == 0
    assert "will not be uploaded" in caplog.text
    assert machine.disk().held() == []
    store.close()


def test_an_entry_that_another_process_is_writing_is_not_given_up(machine: Machine) -> None:
    """It is noted before it is written: who looks for it in between must not take it for lost."""
    store = machine.tiers()
    put(store, 0)
    store.flush()
    entry = machine.disk()
    written = threading.Event()

    class Late(DiskStore):
        """The folder as it is seen by a process that looks right before the entry is written."""

        def files_of(self, key_id: str) -> tuple[Path, Path]:
            found = super().files_of(key_id)
            if key_id == key_of(1).id and not written.is_set():
                written.set()
                put(entry, 1)
                return found[0].with_name("nothing"), found[1]
            return found

    other = TieredStore([Late(machine.folder / "disk"), machine.below], write="back")
    Journal(machine.folder / "disk" / "tiers.sqlite").owe(key_of(1).id, ["objects"])
    assert other.flush() == 0
    assert written.is_set()
    assert there(machine.below.store) == [0, 1]
    other.close()
    store.close()


def test_without_room_for_anything_a_read_from_below_goes_on(machine: Machine) -> None:
    put(machine.below.store, 8)
    machine.below.failing = WRITES
    store = machine.tiers(close_seconds=0.0)
    put(store, 0, 1, 2)
    assert 8 in there(store)
    assert there(machine.disk()) == [0, 1, 2]
    store.close()


def test_a_folder_that_cannot_be_written_to_says_so(machine: Machine) -> None:
    disk = machine.disk()
    put(disk, 0)
    folder = disk.files_of(key_of(0).id)[0].parent
    (disk.path / "store.lock").unlink()
    (disk.path / "store.lock").mkdir()
    try:
        with pytest.raises(StoreWriteError):
            disk.hold([key_of(0).id])
    finally:
        (disk.path / "store.lock").rmdir()
    assert not list(folder.glob("*.held"))


_WRITER = """
import sys
from pathlib import Path
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.stores import example_fingerprint, example_rows

folder, budget, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
disk = DiskStore(folder / "disk", budget_bytes=budget)
store = TieredStore([disk, ObjectStore((folder / "bucket").as_uri())], write="back", close_seconds=60.0)
for number in range(first, 40):
    key = EntryKey(example_fingerprint(), (7, number))
    store.put(key, example_rows(key.tokens))
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 9])
def test_a_killed_writer_in_a_small_folder_loses_nothing(machine: Machine, least: int) -> None:
    """Killed again and again at some moment: what was acknowledged is in the bucket in the end."""
    done = 0
    for _ in range(2):
        arguments = [str(machine.folder), str(int(3.5 * machine.size)), str(done)]
        child = subprocess.Popen([sys.executable, "-c", _WRITER, *arguments], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(least):
            line = child.stdout.readline()
            done = int(line) + 1 if line else done
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split()
        done = int(rest[-1]) + 1 if rest else done
        child.stdout.close()
        child.wait()
    store = machine.tiers()
    assert store.flush() == 0
    assert set(range(done)) <= set(there(machine.below.store))
    assert machine.disk().held() == []
    assert store.check().damaged == ()
    store.close()
