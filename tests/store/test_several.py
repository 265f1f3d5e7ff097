import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvrag.errors import ConfigError, StoreWriteError
from kvrag.segments import KV
from kvrag.store import writing
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore, MemoryTier
from kvrag.store.several import get_many, put_many
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows


def entries(*numbers: int) -> list[tuple[EntryKey, KV]]:
    texts = [(n, n + 1) for n in numbers]
    return [(EntryKey(example_fingerprint(), tokens), example_rows(tokens)) for tokens in texts]


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> KVStore:
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "store")


@pytest.mark.parametrize("by_layer", [False, True])
def test_many_are_what_one_after_the_other_is(store: KVStore, by_layer: bool) -> None:
    put_many(store, entries(*range(20)))
    assert sorted(store.ids()) == sorted(key.id for key, _ in entries(*range(20)))
    wanted = entries(3, 50, 7, 3, 51)
    found = get_many(store, [key for key, _ in wanted], by_layer=by_layer)
    assert set(found) == {key.id for key, _ in entries(3, 7)}
    for key, kv in entries(3, 7):
        assert_same_rows(found[key.id], kv)
    assert (store.stats().hits, store.stats().misses) == (2, 2)
    assert get_many(store, []) == {}
    assert store.check().ok


def test_a_damaged_one_among_many_is_a_miss(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    put_many(store, entries(*range(9)))
    bad = entries(4)[0][0]
    file = tmp_path / bad.id[:2] / f"{bad.id}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-30] ^= 1
    file.write_bytes(raw)
    found = get_many(store, [key for key, _ in entries(*range(9))])
    assert set(found) == {key.id for key, _ in entries(*range(9))} - {bad.id}
    assert store.stats().damaged == 1
    put_many(store, entries(*range(9)))  # mends it, and leaves the others
    assert_same_rows(get_many(store, [bad])[bad.id], entries(4)[0][1])


# --- a batch on the disk ------------------------------------------------------------------------


def files_of(store: DiskStore) -> dict[Path, int]:
    return {
        f: f.stat().st_ino for f in store.path.rglob("*") if f.suffix in (".json", ".safetensors", ".partial")
    }


def test_larger_than_a_group_and_with_repetitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MAX_TOGETHER", 4)
    store = DiskStore(tmp_path)
    store.put_many(entries(*range(11), 3, 3))
    assert len(list(store.ids())) == 11
    before = files_of(store)
    store.put_many(entries(*range(13)))
    assert len(list(store.ids())) == 13
    assert before.items() <= files_of(store).items()  # what was intact was not written again
    store.put_many([])
    assert store.check(grace_seconds=-1).ok


def test_rows_of_another_key_refuse_the_batch(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    (one, _), (_, other) = entries(1, 2)
    with pytest.raises(ConfigError, match="not the same tokens"):
        store.put_many([*entries(5), (one, other)])
    assert not list(store.ids())


def error_of(call: Callable[[], None]) -> StoreWriteError | None:
    try:
        call()
    except StoreWriteError as error:
        return error
    return None


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir", "writev"])
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 6, 7, 9, 12])
def test_a_batch_that_fails_anywhere_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    """Three entries take 6 syncs of files and up to 6 of folders, 6 renames, 3 folders."""
    store = DiskStore(tmp_path / "store")
    put_many(store, entries(9))
    before = files_of(store)
    batch = entries(1, 2, 3)
    count, original = 0, getattr(os, call)

    def fail(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(errno.ENOSPC, "full")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        error = error_of(lambda: store.put_many(batch))
    assert (error is not None) == (count >= nth)
    assert error is None or "free some space" in str(error)
    found = get_many(store, [key for key, _ in batch])
    for key, kv in batch:
        if key.id in found:  # only the last steps come too late to take an entry back
            assert_same_rows(found[key.id], kv)
    named = {f"{key_id}{suffix}" for key_id in found for suffix in (".json", ".safetensors")}
    assert {f.name for f in set(files_of(store)) - set(before)} == named
    assert store.check(grace_seconds=-1).ok
    store.put_many(batch)
    assert len(get_many(store, [key for key, _ in batch])) == 3


def test_one_write_may_be_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take fewer bytes than it is given; the rest follows."""
    store, original = DiskStore(tmp_path), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", lambda descriptor, parts: original(descriptor, bytes(parts[0])[:3]))
        patch.setattr(os, "write", lambda descriptor, rest: original(descriptor, bytes(rest)[:100]))
        store.put_many(entries(1, 2))
    assert store.check().ok
    for key, kv in entries(1, 2):
        assert_same_rows(store.get(key), kv)


def test_each_entry_has_its_own_cost(tmp_path: Path) -> None:
    for store in (DiskStore(tmp_path / "store"), MemoryTier(1 << 20)):
        put_many(store, entries(1, 2), cost_seconds=[0.5, 2.0])
        assert sorted(info.cost_seconds for info in store.entries()) == [0.5, 2.0]
        put_many(store, entries(3), cost_seconds=1.0)
        with pytest.raises(ConfigError, match="1 numbers for 2 entries"):
            put_many(store, entries(4, 5), cost_seconds=[1.0])
        assert len(list(store.ids())) == 3
