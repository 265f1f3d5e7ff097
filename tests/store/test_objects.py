import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.errors import CacheMiss, ConfigError, StoreError, StoreWriteError
from kvrag.segments import KV
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged
from kvrag.store.moving import HEADER_BYTES, DiskBytes, Frame, in_one_piece
from kvrag.store.objects import ObjectStore
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

TOKENS = (3, 1, 4, 1, 5)
KEY = EntryKey(example_fingerprint(), TOKENS)
ROWS = example_rows(TOKENS)


class Unreliable(MemoryFileSystem):
    """fsspec's file system in memory, with a network that can go down."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in its parent, one for all
    pseudo_dirs = [""]  # noqa: RUF012
    down: frozenset[str] = frozenset()
    reads: list[int] = []  # noqa: RUF012

    def _check(self, what: str) -> None:
        if what in Unreliable.down:
            raise TimeoutError(f"{what}: no answer")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self._check("read")
        found = bytes(super().cat_file(path, start, end))
        Unreliable.reads.append(len(found))
        return found

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        self._check("write")
        super().pipe_file(path, value, mode=mode)

    def rm_file(self, path: str) -> None:
        self._check("remove")
        super().rm_file(path)

    def info(self, path: str, **kwargs: Any) -> Any:
        self._check("read")
        return super().info(path, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._check("list")
        return super().find(path, *args, **kwargs)


fsspec.register_implementation("unreliable", Unreliable, clobber=True)


class TestObjectsInMemory(KVStoreContract):
    def make_store(self) -> KVStore:
        return ObjectStore(f"memory://{uuid.uuid4().hex}")


class TestObjectsOverSomethingUnknown(KVStoreContract):
    def make_store(self) -> KVStore:
        return ObjectStore(f"unreliable://{uuid.uuid4().hex}")


class TestObjectsInASharedFolder(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "shared"

    def make_store(self) -> KVStore:
        return ObjectStore(self.folder.as_uri())


class TestObjectsInAFolderOfAnotherFileSystem(TestObjectsInASharedFolder):
    def make_store(self) -> KVStore:
        self.folder.mkdir()
        return ObjectStore("dir://", path=str(self.folder), target_protocol="file")


@pytest.fixture
def store() -> ObjectStore:
    Unreliable.down = frozenset()
    Unreliable.reads.clear()
    return ObjectStore(f"unreliable://{uuid.uuid4().hex}")


def names(store: ObjectStore) -> list[str]:
    root = store.url.removeprefix("unreliable://")
    return sorted(p.split(root)[1].lstrip("/") for p in Unreliable.store if root in p)


def change(store: ObjectStore, how: Callable[[bytearray], object], key: EntryKey = KEY) -> None:
    fs = fsspec.filesystem("unreliable")
    path = f"{store.url}/{key.id[:2]}/{key.id}.kvrag"
    raw = bytearray(fs.cat_file(path))
    how(raw)
    fs.pipe_file(path, bytes(raw))


def flip(at: int) -> Callable[[bytearray], None]:
    def how(raw: bytearray) -> None:
        raw[at % len(raw)] ^= 4

    return how


def test_an_entry_is_one_object_whose_name_says_nothing(store: ObjectStore) -> None:
    store.put(KEY, ROWS)
    assert names(store) == [f"{KEY.id[:2]}/{KEY.id}.kvrag"]


@given(
    st.binary(max_size=200),
    st.lists(st.binary(max_size=99)),
    st.floats(0, 1e9),
    st.none() | st.floats(0, 1e9),
)
def test_frames_come_back(manifest: bytes, data: list[bytes], cost: float, expires: float | None) -> None:
    raw = in_one_piece(manifest, data, cost_seconds=cost, expires=expires)
    frame = Frame.parse(raw[:HEADER_BYTES])
    assert frame.data_start % 64 == 0
    assert frame.num_bytes == len(raw)
    assert raw[HEADER_BYTES : HEADER_BYTES + frame.manifest_bytes] == manifest
    assert raw[frame.data_start :] == b"".join(data)
    assert (frame.cost_seconds, frame.expires) == (cost, expires)
    for at in range(HEADER_BYTES):
        damaged = bytearray(raw[:HEADER_BYTES])
        damaged[at] ^= 1
        with pytest.raises(Damaged):
            Frame.parse(bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_any_changed_or_missing_byte_is_a_miss(at: int, by_layer: bool, cut: bool) -> None:
    Unreliable.down = frozenset()
    store = ObjectStore(f"unreliable://{uuid.uuid4().hex}")
    store.put(KEY, ROWS)

    def how(raw: bytearray) -> None:
        if cut:
            del raw[at % len(raw) :]
        else:
            raw[at % len(raw)] ^= 16

    change(store, how)
    try:
        found = store.get(KEY, by_layer=by_layer)
        rows = KV(found.tokens, tuple(found.layers))
    except CacheMiss:
        with pytest.raises(CacheMiss):
            store.get(KEY)
        assert store.stats().damaged == 1
        assert store.stats().entries == 0
        assert [name.split("/")[0] for name in names(store)] == ["quarantine"]
        assert not store.delete(KEY.id).existed
        assert not names(store)
        return
    assert not cut  # a changed byte that is none of the entry's: of the zeros before the data
    assert_same_rows(rows, ROWS)


def test_layers_that_nobody_touches_are_not_fetched(store: ObjectStore) -> None:
    tokens = tuple(range(200))
    key, rows = EntryKey(example_fingerprint(), tokens), example_rows(tokens, shapes=((2, 64, 64),) * 6)
    store.put(key, rows)
    Unreliable.reads.clear()
    found = store.get(key, by_layer=True)
    assert len(Unreliable.reads) == 2  # what lies before the rows, and the tokens
    layer_bytes = rows.layers[0].num_bytes
    found.layers[3]
    assert Unreliable.reads[2:] == [layer_bytes]
    assert store.stats().bytes_read == layer_bytes
    found.layers[3]
    assert len(Unreliable.reads) == 3
    assert_same_rows(store.get(key), rows)
    assert len(Unreliable.reads) == 5


def test_rows_are_fetched_before_they_are_deleted_here_and_lost_if_elsewhere(store: ObjectStore) -> None:
    tokens = tuple(range(200))
    key, rows = EntryKey(example_fingerprint(), tokens), example_rows(tokens, shapes=((2, 64, 64),) * 6)
    store.put(key, rows)
    held = store.get(key, by_layer=True)
    assert store.delete(key.id)
    assert_same_rows(held, rows)
    store.put(key, rows)
    held = store.get(key, by_layer=True)
    ObjectStore(store.url).delete(key.id)
    with pytest.raises(CacheMiss):
        tuple(held.layers)
    assert store.stats().damaged == 0


def test_entries_of_others_under_this_name_are_set_aside(store: ObjectStore) -> None:
    other = EntryKey(example_fingerprint(model="other"), TOKENS)
    store.put(other, ROWS)
    fs = fsspec.filesystem("unreliable")
    fs.pipe_file(
        f"{store.url}/{KEY.id[:2]}/{KEY.id}.kvrag",
        fs.cat_file(f"{store.url}/{other.id[:2]}/{other.id}.kvrag"),
    )
    assert store.check().damaged == (KEY.id,)
    with pytest.raises(CacheMiss):
        store.get(KEY)
    assert store.check().ok
    assert store.stats().damaged == 1


@pytest.mark.parametrize("by_layer", [False, True])
def test_no_network_is_a_miss_and_says_so(
    store: ObjectStore, by_layer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, ROWS)
    Unreliable.down = frozenset(["read"])
    with pytest.raises(CacheMiss, match="no answer"):
        store.get(KEY, by_layer=by_layer)
    assert KEY not in store
    assert store.read_failures == 2
    assert "no answer" in caplog.text
    Unreliable.down = frozenset()
    assert_same_rows(store.get(KEY), ROWS)
    assert store.stats().damaged == 0


def test_a_network_that_goes_down_between_layers(store: ObjectStore) -> None:
    tokens = tuple(range(200))
    key, rows = EntryKey(example_fingerprint(), tokens), example_rows(tokens, shapes=((2, 64, 64),) * 6)
    store.put(key, rows)
    held = store.get(key, by_layer=True)
    Unreliable.down = frozenset(["read"])
    with pytest.raises(CacheMiss):
        held.layers[5]
    Unreliable.down = frozenset()
    assert_same_rows(held, rows)


def test_what_cannot_be_written_or_removed_is_an_error(store: ObjectStore) -> None:
    store.put(KEY, ROWS)
    Unreliable.down = frozenset(["write", "remove", "list"])
    other = EntryKey(example_fingerprint(), (1, 2))
    with pytest.raises(StoreWriteError, match="no answer"):
        store.put(other, example_rows((1, 2)))
    with pytest.raises(StoreWriteError, match="delete it again"):
        store.delete(KEY.id)
    with pytest.raises(StoreError, match="list"):
        list(store.ids())
    assert store.stats().entries == 0
    assert store.stats().write_failures == 1
    Unreliable.down = frozenset()
    assert list(store.ids()) == [KEY.id]
    assert_same_rows(store.get(KEY), ROWS)


def test_damage_that_cannot_be_moved_is_reported_once(store: ObjectStore) -> None:
    store.put(KEY, ROWS)
    change(store, flip(-40))
    Unreliable.down = frozenset(["remove"])
    for _ in range(2):
        with pytest.raises(CacheMiss):
            store.get(KEY)
    assert store.stats().damaged == 1
    Unreliable.down = frozenset()
    store.put(KEY, ROWS)
    assert_same_rows(store.get(KEY), ROWS)


def test_quarantine_keeps_the_last_few(store: ObjectStore) -> None:
    for number in range(10):
        key = EntryKey(example_fingerprint(), (number, 1))
        store.put(key, example_rows(key.tokens))
        change(store, flip(-1), key)
        with pytest.raises(CacheMiss):
            store.get(key)
    assert len(names(store)) == 8


def test_entries_end(store: ObjectStore) -> None:
    store.put(KEY, ROWS, ttl_seconds=1000, cost_seconds=2.5)
    entry = store.export_bytes(KEY.id)
    assert entry.cost_seconds == 2.5
    assert entry.expires is not None
    assert math.isclose(entry.expires, time.time() + 1000, abs_tol=100)
    assert store.sweep() == ()
    store.put(KEY, ROWS, ttl_seconds=1e-9)
    with pytest.raises(CacheMiss, match="over"):
        store.get(KEY)
    assert store.sweep() == (KEY.id,)
    assert not names(store)


def test_a_long_manifest_is_read_in_two_pieces(store: ObjectStore) -> None:
    rows = example_rows((1, 2), shapes=((1, 1, 1),) * 1600)
    key = EntryKey(example_fingerprint(), (1, 2))
    store.put(key, rows)
    assert len(store.export_bytes(key.id).manifest) > 64 << 10
    for by_layer in (False, True):
        assert_same_rows(store.get(key, by_layer=by_layer), rows)


def test_bytes_go_to_a_disk_and_back_unchanged(store: ObjectStore, tmp_path: Path) -> None:
    disk = DiskStore(tmp_path / "store")
    moves = DiskBytes(disk)
    disk.put(KEY, ROWS)
    before = moves.export_bytes(KEY.id)
    store.import_bytes(before)
    assert_same_rows(store.get(KEY), ROWS)
    raw = before.manifest, bytes(before.data.numpy())
    disk.delete(KEY.id)
    with pytest.raises(CacheMiss):
        moves.export_bytes(KEY.id)
    moves.import_bytes(store.export_bytes(KEY.id))
    after = moves.export_bytes(KEY.id)
    assert (after.manifest, bytes(after.data.numpy())) == raw
    assert_same_rows(disk.get(KEY), ROWS)
    for name in ("", "x", "../../x"):
        with pytest.raises(CacheMiss):
            store.export_bytes(name)


def test_what_uploads_leave_behind_is_found(tmp_path: Path) -> None:
    store = ObjectStore((tmp_path / "shared").as_uri())
    store.put(KEY, ROWS)
    left = tmp_path / "shared" / KEY.id[:2] / f"{KEY.id}.kvrag.0.partial"
    left.write_bytes(b"half")
    assert len(store.check().orphans) == 1
    assert list(store.ids()) == [KEY.id]
    store.check(fix=True)
    assert not left.exists()
    assert_same_rows(store.get(KEY), ROWS)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        ObjectStore("nosuch://bucket")
    with pytest.raises(ConfigError, match="verify"):
        ObjectStore("memory://x", verify="no")  # type: ignore[arg-type]
