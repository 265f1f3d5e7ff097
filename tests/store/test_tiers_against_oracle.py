import shutil
import tempfile
import uuid
from pathlib import Path

import fsspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.segments import KV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore, MemoryTier
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.faults import READS, WRITES, FaultyStore
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

NUMBERS = st.integers(0, 4)
BUDGET = 2 * example_rows((7, 0)).num_bytes


def key_of(number: int) -> EntryKey:
    return EntryKey(example_fingerprint(), (7, number))


class Tiers(RuleBasedStateMachine):
    """Memory, disk and objects that are evicted from, damaged and out of reach, against a dictionary.

    What is read is what was put or nothing; nothing only if no intact copy could be reached.
    """

    @initialize(write=st.sampled_from(["through", "back"]))
    def begin(self, write: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.url = f"memory://{uuid.uuid4().hex}"
        self.write = write
        self.oracle = MemoryStore()
        self.intact: dict[int, set[str]] = {number: set() for number in range(5)}
        self.failing: frozenset[str] = frozenset()
        self.unsure: set[int] = set()  # deletions that not all tiers have confirmed
        self.open()

    def open(self) -> None:
        self.memory = MemoryTier(BUDGET)
        self.disk = DiskStore(self.folder)
        self.objects = ObjectStore(self.url)
        self.lower = FaultyStore(self.objects, "objects")
        self.lower.failing = self.failing
        self.store = TieredStore(
            [self.memory, self.disk, self.lower],
            write=self.write,  # type: ignore[arg-type]
            copy_mapped=True,
            close_seconds=5,
        )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        key = key_of(number)
        rows = example_rows(key.tokens)
        try:
            self.store.put(key, rows)
        except StoreWriteError:
            assert self.failing
            assert self.write == "through"
            return
        self.oracle.put(key, rows)
        self.unsure.discard(number)
        self.intact[number] = {"disk", "objects"} if self.write == "through" else {"disk"}

    @rule(number=NUMBERS, by_layer=st.booleans())
    def get(self, number: int, by_layer: bool) -> None:
        try:
            expected = self.oracle.get(key_of(number))
        except CacheMiss:
            expected = None
        try:
            found = self._read(number, by_layer)
        except CacheMiss:
            reachable = self.intact[number] - ({"objects"} if self.failing & READS else set())
            assert expected is None or not reachable
            return
        assert expected is not None
        assert_same_rows(found, expected)

    def _read(self, number: int, by_layer: bool) -> KV:
        for last in (False, True):
            try:
                found = self.store.get(key_of(number), by_layer=by_layer)
                return KV(found.tokens, tuple(found.layers))
            except CacheMiss:
                if last:
                    raise
        raise AssertionError

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        key = key_of(number)
        existed = self.oracle.delete(key.id).existed
        before = bool(self.intact[number])
        self.intact[number] = set()
        try:
            receipt = self.store.delete(key.id)
        except StoreWriteError:
            assert self.failing
            self.unsure.add(number)
            return
        self.unsure.discard(number)
        assert bool(receipt) or not (existed and before)
        for tier in (self.memory, self.disk, self.objects):
            assert key not in tier

    @rule(number=NUMBERS)
    def evict_from_disk(self, number: int) -> None:
        self.disk.delete(key_of(number).id)
        self.intact[number].discard("disk")

    @rule(number=NUMBERS, place=st.integers(1, 200))
    def damage_disk(self, number: int, place: int) -> None:
        key_id = key_of(number).id
        file = self.folder / key_id[:2] / f"{key_id}.safetensors"
        if file.exists():
            raw = bytearray(file.read_bytes())
            raw[-place] ^= 1
            file.unlink()  # what is mapped stays as it was
            file.write_bytes(raw)
            self.intact[number].discard("disk")

    @rule(number=NUMBERS, place=st.integers(1, 200))
    def damage_object(self, number: int, place: int) -> None:
        key_id, fs = key_of(number).id, fsspec.filesystem("memory")
        path = f"{self.url}/{key_id[:2]}/{key_id}.kvrag"
        if fs.exists(path):
            raw = bytearray(fs.cat_file(path))
            raw[-place] ^= 1
            fs.pipe_file(path, bytes(raw))
            self.intact[number].discard("objects")

    @rule(failing=st.sampled_from([frozenset(), READS, WRITES, READS | WRITES]))
    def network(self, failing: frozenset[str]) -> None:
        self.failing = self.lower.failing = failing

    @precondition(lambda self: self.write == "back")
    @rule()
    def flush(self) -> None:
        if self.store.flush(30) == 0:
            for places in self.intact.values():
                if "disk" in places:
                    places.add("objects")

    @rule()
    def sweep(self) -> None:
        self.store.sweep(grace_seconds=0)
        if not self.failing & WRITES:
            for number in self.unsure:
                assert key_of(number) not in self.objects
            self.unsure.clear()

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.open()

    @invariant()
    def what_was_deleted_is_not_there(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.memory.stats().num_bytes <= BUDGET
        gone = {key_of(n).id for n in range(5)} - set(self.oracle.ids())
        assert not gone & set(self.store.ids())
        assert not any(key_id in self.store for key_id in gone)


def test_tiers_against_a_dictionary() -> None:
    run_state_machine_as_test(
        Tiers,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
