"""Every operation dies, or fails, at every single step: the contract of docs/store.md."""

import errno
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store import index
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

CALLS = ("open", "replace", "unlink", "fsync", "mkdir", "write", "writev", "ftruncate", "posix_fallocate")
KEYS = [EntryKey(example_fingerprint(), (n, n + 1)) for n in range(6)]
NEW = EntryKey(example_fingerprint(), (100, 101))
PINNED, DAMAGED, SHORT = KEYS[0], KEYS[1], KEYS[2]
NOW = 1.8e9
BUDGET = 9_600  # six entries of 1.5 kB fit, seven do not


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process dies here, not the machine: what was written is there, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def opened(folder: Path, *, budget: int | None = None, later: float = 0.0) -> DiskStore:
    return DiskStore(folder, budget_bytes=budget, wall_clock=lambda: NOW + later)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of stores are made and thrown away."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("crashes")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(place: Path) -> Path:
    """Six entries, one pinned, one damaged, one with a time to live; what a crash left; a full quarantine."""
    folder = place / "template"
    store = opened(folder)
    for key in KEYS:
        store.put(key, example_rows(key.tokens), ttl_seconds=60 if key is SHORT else None)
    store.pin(PINNED.id)
    data = store.files_of(DAMAGED.id)[1]
    raw = bytearray(data.read_bytes())
    raw[-30] ^= 1
    data.write_bytes(raw)
    lone = store.files_of("ab" * 32)[1]
    lone.parent.mkdir(exist_ok=True)
    lone.write_bytes(b"data of no entry")
    lone.with_name(f"{'cd' * 32}.0.safetensors.partial").write_bytes(b"half")
    (folder / "quarantine").mkdir()
    for number in range(10):
        (folder / "quarantine" / f"{number:064x}.{number}.json").write_bytes(b"{}")
    store.close()
    return folder


@pytest.fixture
def fresh(template: Path, place: Path) -> Callable[[], Path]:
    """Gives the template anew, in a folder of its own."""

    def make() -> Path:
        shutil.rmtree(place / "now", ignore_errors=True)
        return Path(shutil.copytree(template, place / "now"))

    return make


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "put": lambda folder: opened(folder).put(NEW, example_rows(NEW.tokens)),
    "put over a damaged one": lambda folder: opened(folder).put(DAMAGED, example_rows(DAMAGED.tokens)),
    "put that evicts": lambda folder: opened(folder, budget=BUDGET).put(NEW, example_rows(NEW.tokens)),
    "renew": lambda folder: opened(folder).put(KEYS[3], example_rows(KEYS[3].tokens), ttl_seconds=9),
    "delete": lambda folder: opened(folder).delete(KEYS[4].id),
    "delete a pinned one": lambda folder: opened(folder).delete(PINNED.id),
    "pin": lambda folder: opened(folder).pin(KEYS[5].id),
    "sweep": lambda folder: opened(folder, later=100).sweep(),
    "sweep to a budget": lambda folder: opened(folder, budget=BUDGET - 4000).sweep(),
    "set aside": lambda folder: missing(opened(folder), DAMAGED),
    "check": lambda folder: opened(folder).check(fix=True),
    "rebuild": lambda folder: opened(folder).rebuild(),
    "flush": lambda folder: flushed(opened(folder)),
}
TOUCHED = {  # what may be there or not afterwards; SHORT expires in sweeps, eviction may take any but PINNED
    "put": {NEW},
    "put over a damaged one": set(),
    "put that evicts": {NEW, *KEYS} - {PINNED},
    "delete": {KEYS[4]},
    "delete a pinned one": {PINNED},
    "sweep": {SHORT},
    "sweep to a budget": set(KEYS) - {PINNED},
}


def missing(store: DiskStore, key: EntryKey) -> None:
    with pytest.raises(CacheMiss):
        store.get(key)


def flushed(store: DiskStore) -> None:
    store.get(KEYS[3])
    store.close()


@contextmanager
def striking(at: int, strike: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Call `strike` at the call of this number that goes to the operating system or to SQLite."""
    count = 0

    def step() -> bool:
        nonlocal count
        count += 1
        return count == at

    def wrapped(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            if step():
                strike()
            return original(*args, **kwargs)

        return call

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = original_connect(*args, **kwargs)
        db.set_trace_callback(lambda _: strike() if step() else None)
        return db

    original_connect = index.connect
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            if hasattr(os, name):
                patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr(index, "connect", connect)
        yield lambda: count


def dies(folder: Path, operation: Callable[[Path], object], at: int) -> bool:
    """Run it in a process that is gone at this step; whether it was, or ended before."""
    child = os.fork()
    if child == 0:
        try:
            with striking(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                operation(folder)
        except BaseException:
            os._exit(7)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def assert_sound(folder: Path, name: str) -> None:
    """Nothing wrong can be read, nothing is lost but what was touched, and sweeping leaves no trace."""
    store = opened(folder)
    committed = sum(store._folder.size(key_id) for key_id in store.ids())
    assert name != "put that evicts" or committed <= BUDGET
    touched = TOUCHED.get(name, set())
    for key in (*KEYS, NEW):
        if key is DAMAGED:
            continue
        try:
            assert_same_rows(store.get(key), example_rows(key.tokens))
        except CacheMiss:
            assert key in touched or key is NEW
    before = store.stats()
    assert before.damaged == 0
    assert before.entries == len(list(store.ids()))
    assert before.num_bytes == sum(store._folder.size(key_id) for key_id in store.ids())
    with suppress(CacheMiss):
        assert_same_rows(store.get(DAMAGED), example_rows(DAMAGED.tokens))
    store.sweep()
    assert store.check().ok
    left = [file.name for file in folder.rglob("*") if file.suffix == ".partial"]
    assert not left
    data, manifests = (
        {file.stem for file in folder.glob(f"??/*{suffix}")} for suffix in (".safetensors", ".json")
    )
    assert data == manifests
    assert len(list((folder / "quarantine").iterdir())) <= 16
    for key in KEYS:
        store.put(key, example_rows(key.tokens))
        assert_same_rows(store.get(key), example_rows(key.tokens))
    if PINNED not in touched:
        assert (info := store.info(PINNED.id)) is not None
        assert info.pinned
    store.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_process_that_dies_at_any_step(fresh: Callable[[], Path], name: str) -> None:
    at = 1
    while dies(folder := fresh(), OPERATIONS[name], at):
        assert_sound(folder, name)
        at += 1
    assert at > 4
    assert_sound(folder, name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_at_any_step(fresh: Callable[[], Path], name: str, number: int) -> None:
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    for at in range(1, 200):
        folder = fresh()
        with striking(at, strike) as count, suppress(StoreWriteError):
            OPERATIONS[name](folder)
        assert_sound(folder, name)
        if count() < at:
            break
    assert 4 < at < 199
