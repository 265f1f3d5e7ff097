"""The index: derived from the files, rebuilt from them whenever it is not what it has to be."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.store import index, index_file
from kvrag.store.base import EntryInfo
from kvrag.store.clock import StoreClock
from kvrag.store.disk import DiskStore
from kvrag.store.index import EntryIndex
from kvrag.store.key import EntryKey
from kvrag.testing.stores import FILLED_SHAPES, assert_same_rows, example_fingerprint, example_rows, fill

KEYS = [EntryKey(example_fingerprint(tenant="ab"[n % 2]), (n, n + 1)) for n in range(8)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "store")
    for key in KEYS:
        store.put(key, example_rows(key.tokens), cost_seconds=1.5)
    yield store
    store.close()


def index_of(store: DiskStore) -> Path:
    return store.path / "index.sqlite"


def assert_right(store: DiskStore, keys: list[EntryKey] = KEYS) -> None:
    """The index says what the files do, and every entry is there."""
    assert store.stats().entries == len(keys)
    assert store.stats().num_bytes == sum(
        file.stat().st_size for file in store.path.glob("??/*") if file.suffix != ".pin"
    )
    infos = list(store.entries())
    assert [info.id for info in infos] == sorted(key.id for key in keys)
    assert {info.cost_seconds for info in infos} <= {1.5}
    assert store.check().ok
    for key in keys:
        assert_same_rows(store.get(key), example_rows(key.tokens))


# --- lost, damaged, foreign ---------------------------------------------------------------------


def scribble(path: Path, position: float = 0.0) -> None:
    raw = bytearray(path.read_bytes())
    start = int(position * (len(raw) - 64))
    raw[start : start + 64] = os.urandom(64)
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 5000),
    "text": lambda path: path.write_text("no database"),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 7),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "header": scribble,
    "foreign": lambda path: (
        path.unlink(),
        sqlite3.connect(path).execute("CREATE TABLE x (y)").connection.close(),
    ),
}


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_index_is_built_anew(
    store: DiskStore, how: str, opened: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store.close()
    if opened:
        store.stats()
    DAMAGE[how](index_of(store))
    if not opened or how == "removed":
        assert_right(store)
        assert how == "removed" or "built from the files" in caplog.text
    else:  # others have it open still: they read on from their own memory, or notice
        other = DiskStore(store.path)
        other.check(fix=True)
        assert_right(other)
        other.close()
    store.close()
    assert_right(DiskStore(store.path))


@pytest.mark.parametrize("page", range(20))
def test_an_index_with_a_spoilt_page_loses_nothing(store: DiskStore, page: int) -> None:
    store.close()
    raw = bytearray(index_of(store).read_bytes())
    at = page * len(raw) // 20
    raw[at : at + 200] = bytes(b ^ 0x5A for b in raw[at : at + 200])
    index_of(store).write_bytes(raw)
    for key in KEYS:
        assert_same_rows(store.get(key), example_rows(key.tokens))
    new = EntryKey(example_fingerprint(tenant="a"), (50, 51))
    store.put(new, example_rows(new.tokens), cost_seconds=1.5)
    store.check(fix=True)
    assert_right(store, [*KEYS, new])


def test_processes_that_have_a_replaced_index_open_move_on(store: DiskStore) -> None:
    other = DiskStore(store.path)
    assert other.stats().entries == 8
    index_of(store).unlink()
    store.put(key := EntryKey(example_fingerprint(), (90, 91)), example_rows((90, 91)), cost_seconds=1.5)
    assert other.stats().entries == 9
    other.delete(key.id)
    assert store.stats().entries == 8
    other.close()
    assert_right(store)


def test_files_that_come_and_go_without_us(store: DiskStore, tmp_path: Path) -> None:
    gone, more = KEYS[0], EntryKey(example_fingerprint(), (70, 71))
    elsewhere = DiskStore(tmp_path / "elsewhere")
    elsewhere.put(more, example_rows(more.tokens), cost_seconds=1.5)
    for file in store.files_of(gone.id):
        file.unlink()
    for theirs, mine in zip(elsewhere.files_of(more.id), store.files_of(more.id), strict=True):
        mine.parent.mkdir(exist_ok=True)
        shutil.copy(theirs, mine)
    with pytest.raises(CacheMiss):
        store.get(gone)
    assert gone not in store
    assert more in store
    assert more.id in set(store.ids())
    assert set(store.check().index) == {gone.id, more.id}
    report = store.sweep()
    assert (report.adopted, report.forgotten) == ((more.id,), (gone.id,))
    assert_right(store, [*KEYS[1:], more])


def test_a_loaded_entry_that_the_index_lacks_is_taken_up(store: DiskStore) -> None:
    store.close()
    db = sqlite3.connect(index_of(store))
    db.execute("DELETE FROM entries WHERE id = ?", (KEYS[0].id,))
    db.commit()
    db.close()
    assert store.stats().entries == 7
    store.get(KEYS[0])
    store.close()
    assert store.stats().entries == 8


def test_wrong_sums_are_found(store: DiskStore) -> None:
    store.close()
    db = sqlite3.connect(index_of(store))
    db.execute("UPDATE totals SET num_bytes = num_bytes + 1")
    db.commit()
    db.close()
    assert store.check().index == ("totals",)
    store.check(fix=True)
    assert_right(store)


# --- counting -----------------------------------------------------------------------------------


def test_hits_are_counted_in_memory_and_kept(store: DiskStore) -> None:
    for _ in range(3):
        store.get(KEYS[0])
    assert (info := store.info(KEYS[0].id)) is not None
    assert info.hits == 3
    store.get(KEYS[0])
    store.close()
    assert (info := DiskStore(store.path).info(KEYS[0].id)) is not None
    assert info.hits == 4
    assert (info.tenant, info.num_tokens, info.pinned) == ("a", 2, False)


def test_loads_write_nothing_until_there_are_many(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    original = EntryIndex.hit

    def hit(self: EntryIndex, hits: list[tuple[str, int]], clock: StoreClock) -> list[str]:
        calls["hit"] += 1
        return original(self, hits, clock)

    monkeypatch.setattr(EntryIndex, "hit", hit)
    for _ in range(125):
        for key in KEYS:
            store.get(key)
    store.get(KEYS[0])
    assert store._hits._thread is not None
    store._hits._thread.join()
    assert calls["hit"] == 1
    assert (info := store.info(KEYS[0].id)) is not None
    assert info.hits == 126


def test_info_of_nothing(store: DiskStore) -> None:
    assert store.info("0" * 64) is None
    assert store.info("../x") is None
    with pytest.raises(ConfigError):
        store.files_of("../x")
    with pytest.raises(CacheMiss):
        store.damage("0" * 64)
    assert store.damage(KEYS[0].id) is None


# --- entries from elsewhere ---------------------------------------------------------------------


def test_entries_move_between_stores_as_bytes(store: DiskStore, tmp_path: Path) -> None:
    key, other = KEYS[0], DiskStore(tmp_path / "other")
    manifest, data = (file.read_bytes() for file in store.files_of(key.id))
    with pytest.raises(ConfigError, match="not the bytes"):
        other.put_bytes(key.id, manifest, [data[:-1]])
    with pytest.raises(ConfigError, match="not the bytes"):
        other.put_bytes(key.id, manifest, [data[:-1] + b"x"])
    with pytest.raises(ConfigError, match="no name"):
        other.put_bytes("x", manifest, [data])
    assert other.put_bytes(key.id, manifest, [data[:100], memoryview(data)[100:]])
    assert not other.put_bytes(key.id, manifest, [data])
    assert_right(other, [key])
    third = DiskStore(tmp_path / "third")
    assert third.adopt(other, key.id)
    assert_right(third, [key])
    assert_right(other, [])
    assert not third.adopt(store, key.id)
    with pytest.raises(CacheMiss):
        third.adopt(other, key.id)
    with pytest.raises(StoreWriteError, match="budget"):
        DiskStore(tmp_path / "small", budget_bytes=100).put_bytes(key.id, manifest, [data])


# --- as few steps for many as for few -----------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Folders listed, files looked at, and steps of SQLite's machine."""
    work: Counter[str] = Counter()

    def connect(*args: object, **kwargs: object) -> sqlite3.Connection:
        db = original(*args, **kwargs)  # type: ignore[arg-type]  # handed on
        db.set_progress_handler(lambda: work.update(steps=1), 1)
        return db

    def watched(name: str) -> Callable[..., object]:
        call = getattr(os, name)

        def count(*args: object, **kwargs: object) -> object:
            work[name] += 1
            return call(*args, **kwargs)

        return count

    original = index.connect
    with monkeypatch.context() as patch:
        patch.setattr(index, "connect", connect)
        for name in ("listdir", "scandir", "stat", "open"):
            patch.setattr(os, name, watched(name))
        yield work


def test_opening_is_as_much_work_for_many_entries_as_for_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand rows, two thousand of them with files: nothing but rows and folders could matter."""
    work = []
    for count, more in ((100, 0), (2_000, 98_000)):
        folder = tmp_path / str(count)
        keys = fill(folder, count)
        assert DiskStore(folder).rebuild() == count
        _add_rows(folder, more)
        with counted(monkeypatch) as counts:
            store = DiskStore(folder)
            assert store.stats().entries == count + more
            store.get(keys[-1])
            store.info(keys[-1].id)
            store.close()
        work.append(counts)
        assert_same_rows(store.get(keys[7]), example_rows(keys[7].tokens, shapes=FILLED_SHAPES))
    few, many = work
    assert few["listdir"] == many["listdir"] == few["scandir"] == many["scandir"] == 0
    assert (few["stat"], few["open"]) == (many["stat"], many["open"])
    assert many["steps"] == pytest.approx(few["steps"], rel=0.1)
    assert many["steps"] < 2_000


def _add_rows(folder: Path, count: int) -> None:
    ledger_index = EntryIndex(folder / "index.sqlite", "gdsf")
    rows = (EntryInfo(f"{n:064x}", "", 9, 4, 1e9 + n, 0, 0.0, None, False) for n in range(count))
    ledger_index.finish(rows, (), StoreClock())
    ledger_index.close()


# --- where it cannot be as it should ------------------------------------------------------------


def test_network_folders_get_a_rollback_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/my\\040share nfs4 rw 0 0\n")
    monkeypatch.setattr(index_file, "_MOUNTS", mounts)
    shared = tmp_path / "my share"
    shared.mkdir()
    assert index_file.is_on_network(shared)
    assert not index_file.is_on_network(tmp_path)
    caplog.set_level(logging.INFO)
    store = DiskStore(shared / "store")
    for key in KEYS:
        store.put(key, example_rows(key.tokens), cost_seconds=1.5)
    assert "rollback journal" in caplog.text
    assert not index_of(store).with_name("index.sqlite-wal").exists()
    assert_right(store)
    store.close()


def test_without_any_index_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(index, "connect", refuse)
    store = DiskStore(tmp_path)
    for key in KEYS:
        store.put(key, example_rows(key.tokens), cost_seconds=1.5, ttl_seconds=1e9)
    assert caplog.text.count("goes on without its index") == 1
    assert store.stats().entries == 8
    assert {info.id for info in store.entries()} == {key.id for key in KEYS}
    assert len(list(store.entries("a"))) == 4
    store.get(KEYS[0])
    store.delete(KEYS[0].id)
    store.sweep()
    assert store.check().ok
    assert store.stats().entries == 7
    assert (info := store.info(KEYS[1].id)) is not None
    assert info.cost_seconds == 1.5
    with pytest.raises(StoreWriteError, match="without budget_bytes"):
        DiskStore(tmp_path, budget_bytes=10_000).put(KEYS[0], example_rows(KEYS[0].tokens))
    store.close()


def test_an_index_on_a_full_disk(store: DiskStore) -> None:
    """SQLite is refused another page, as by a disk without room: the index follows the files later."""
    store.stats()
    db = store._ledger._index._db  # type: ignore[union-attr]  # it is open
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    more = [EntryKey(example_fingerprint(tenant="b" * 3000), (n, 7)) for n in range(20)]
    for key in more:
        store.put(key, example_rows(key.tokens), cost_seconds=1.5)
        assert_same_rows(store.get(key), example_rows(key.tokens))
    store.close()
    store.sweep()
    assert_right(store, KEYS + more)


def test_forked_children_open_an_index_of_their_own(store: DiskStore) -> None:
    assert store.stats().entries == 8
    child = os.fork()
    if child == 0:
        try:
            new = EntryKey(example_fingerprint(), (60, 61))
            store.put(new, example_rows(new.tokens), cost_seconds=1.5)
            store.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert store.stats().entries == 9
    store.delete(EntryKey(example_fingerprint(), (60, 61)).id)
    assert_right(store)


def test_a_store_on_a_read_only_medium(tmp_path: Path) -> None:
    """Mounted by itself in a name space of the test's own, where that is allowed."""
    folder = tmp_path / "store"
    keys = fill(folder, 30)
    store = DiskStore(folder)
    store.rebuild()
    store.close()
    script = (
        "import sys; from pathlib import Path\n"
        "from kvrag.store.disk import DiskStore\n"
        "store = DiskStore(sys.argv[1])\n"
        "assert store.stats().entries == 30, store.stats()\n"
        "assert len(list(store.entries())) == 30\n"
        "store.close()\n"
        "try: store.delete(sys.argv[2])\n"
        "except OSError as error: print(error)\n"
    )
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", folder, sys.executable, script, keys[0].id]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("cannot mount here")
    assert done.returncode == 0, done.stderr
    assert "read-only" in done.stdout
    assert "goes on without" not in done.stderr
