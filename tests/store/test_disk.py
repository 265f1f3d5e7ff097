import errno
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.segments import KV
from kvrag.store import files
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

TOKENS = (3, 1, 4, 1, 5)


class TestDiskStore(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"

    def make_store(self) -> KVStore:
        return DiskStore(self.folder)


class TestDiskStoreThatKeepsNothing(TestDiskStore):
    def make_store(self) -> KVStore:
        return DiskStore(self.folder, keep_bytes=0)


class TestDiskStoreThatReadsDirectly(TestDiskStore):
    def make_store(self) -> KVStore:
        return DiskStore(self.folder, direct=True)


class TestDiskStoreThatVerifiesNothing(TestDiskStore):
    def make_store(self) -> KVStore:
        return DiskStore(self.folder, verify="never")


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "store")


def key_of(*tokens: int, **changes: str) -> EntryKey:
    return EntryKey(example_fingerprint(**changes), tokens or TOKENS)


def put(store: DiskStore, *tokens: int) -> EntryKey:
    key = key_of(*tokens)
    store.put(key, example_rows(key.tokens))
    return key


def manifest_of(store: DiskStore, key: EntryKey) -> Path:
    return store.path / key.id[:2] / f"{key.id}.json"


def data_of(store: DiskStore, key: EntryKey) -> Path:
    return store.path / key.id[:2] / f"{key.id}.safetensors"


def all_files(store: DiskStore) -> list[Path]:
    """Everything but locks and index."""
    around = ("store.lock", "writers.lock", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm")
    return [f for f in store.path.rglob("*") if f.is_file() and f.name not in around]


def assert_damage_is_a_miss(store: DiskStore, key: EntryKey) -> None:
    """A fresh look at the entry misses, counts, moves the files aside; then the entry can be put again."""
    fresh = DiskStore(store.path)
    with pytest.raises(CacheMiss):
        fresh.get(key)
    assert fresh.stats().damaged == 1
    assert fresh.stats().misses == 1
    assert key not in fresh
    assert not data_of(store, key).exists()
    assert list((store.path / "quarantine").glob(f"{key.id}.*"))
    fresh.put(key, example_rows(key.tokens))
    assert_same_rows(fresh.get(key), example_rows(key.tokens))
    assert key.id not in fresh.check().damaged


# --- the format ---------------------------------------------------------------------------------


def test_safetensors_itself_reads_the_file(store: DiskStore) -> None:
    key = put(store)
    kv = example_rows(TOKENS)
    tensors = load_file(data_of(store, key))
    assert sorted(tensors) == ["000.keys", "000.values", "001.keys", "001.values", "tokens"]
    assert torch.equal(tensors["001.values"], kv.layers[1].values)
    assert tensors["tokens"].tolist() == list(TOKENS)
    with safe_open(data_of(store, key), "pt") as file:
        assert file.metadata()["format"] == "kvrag"
        assert file.metadata()["model"] == "m"


def test_layers_lie_one_after_the_other_and_aligned(store: DiskStore) -> None:
    key = put(store)
    raw = data_of(store, key).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    offsets = [tuple(entry["data_offsets"]) for entry in header.values()]
    assert list(header) == ["000.keys", "000.values", "001.keys", "001.values", "tokens"]
    assert all(a[1] == b[0] for a, b in pairwise(offsets))
    assert (8 + length) % 64 == 0
    assert store.get(key).layers[0].keys.data_ptr() % 64 == 0


def test_the_manifest_has_no_text_and_the_sums_are_xxh3(store: DiskStore) -> None:
    key = put(store)
    manifest = json.loads(manifest_of(store, key).read_text())
    raw = data_of(store, key).read_bytes()
    assert manifest["file_size"] == len(raw)
    assert manifest["num_tokens"] == len(TOKENS)
    assert manifest["fingerprint"] == key.fingerprint.fields()
    start = manifest["data_start"]
    end = start + 2 * len(TOKENS) * 16 * 4
    assert manifest["checksums"]["layers"][0] == xxhash.xxh3_128_hexdigest(raw[start:end])
    assert "tokens" not in manifest


def test_the_bytes_of_an_entry(tmp_path: Path) -> None:
    """Bytes written down here, so that a change of the format cannot go unnoticed."""
    key = EntryKey(example_fingerprint(), (7,))
    store = DiskStore(tmp_path)
    store.put(key, KV((7,), tuple(example_rows((7,), shapes=((1, 2, 2),)).layers)))
    raw = data_of(store, key).read_bytes()
    assert xxhash.xxh3_64_hexdigest(raw[: len(raw) - 4 - 16]) == xxhash.xxh3_64_hexdigest(
        _header_as_specified()
    )


def _header_as_specified() -> bytes:
    text = (
        b'{"__metadata__":{"format":"kvrag","model":"m","tokenizer":"t","rope":"r","dtype":"float32",'
        b'"prefix":"p","codec":"raw","tenant":"","layout":"2"},'
        b'"000.keys":{"dtype":"F32","shape":[1,1,2],"data_offsets":[0,8]},'
        b'"000.values":{"dtype":"F32","shape":[1,1,2],"data_offsets":[8,16]},'
        b'"tokens":{"dtype":"I32","shape":[1],"data_offsets":[16,20]}}'
    )
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


# --- mapping ------------------------------------------------------------------------------------


def test_rows_are_views_of_one_mapping_and_cannot_damage_the_file(store: DiskStore) -> None:
    key = put(store)
    before = data_of(store, key).read_bytes()
    kv = store.get(key)
    pointers = [t.untyped_storage().data_ptr() for layer in kv.layers for t in (layer.keys, layer.values)]
    assert len(set(pointers)) == 1
    assert len({layer.keys.untyped_storage().nbytes() for layer in kv.layers}) == 1
    kv.layers[0].keys.zero_()
    assert data_of(store, key).read_bytes() == before
    assert_same_rows(DiskStore(store.path).get(key), example_rows(TOKENS))


def test_hot_entries_are_not_verified_again(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store)
    first = store.get(key)
    monkeypatch.setattr("kvrag.store.layout.verify", lambda *_: pytest.fail("verified again"))
    assert store.get(key).layers[0].keys.data_ptr() == first.layers[0].keys.data_ptr()


def test_a_kept_mapping_does_not_outlive_its_files(store: DiskStore) -> None:
    key = put(store)
    store.get(key)
    other = DiskStore(store.path)
    other.delete(key.id)
    with pytest.raises(CacheMiss):
        store.get(key)
    assert store.stats().damaged == 0
    put(other)
    assert_same_rows(store.get(key), example_rows(TOKENS))


def test_a_file_changed_in_place_is_verified_again(store: DiskStore) -> None:
    key = put(store)
    store.get(key)
    flip(data_of(store, key), -30)
    os.utime(data_of(store, key), ns=(1, 1))
    with pytest.raises(CacheMiss):
        store.get(key)
    assert store.stats().damaged == 1


def test_kept_bytes_are_bounded(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, keep_bytes=3000)
    keys = [put(store, i, i + 1) for i in range(6)]
    for key in keys:
        store.get(key)
    kept = store._loader.kept
    assert 0 < len(kept._entries) < 6
    assert kept._num_bytes <= 3000
    assert_same_rows(store.get(keys[0]), example_rows((0, 1)))


def test_mappings_hold_no_file_descriptors(store: DiskStore) -> None:
    keys = [put(store, i) for i in range(20)]
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    rows = [store.get(key) for key in keys]
    after = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert after == before
    assert len(rows) == 20


# --- attacks on files ---------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("part", ["data", "manifest"])
def test_truncated_anywhere(store: DiskStore, part: str) -> None:
    key = put(store)
    path = data_of(store, key) if part == "data" else manifest_of(store, key)
    size = path.stat().st_size
    for length in sorted({0, 1, 7, 8, 9, 63, 64, size // 2, size - 21, size - 1, *range(0, size, 97)}):
        os.truncate(path, min(length, path.stat().st_size - 1))  # manifests differ by a digit
        assert_damage_is_a_miss(store, key)


@pytest.mark.parametrize("part", ["data", "manifest"])
def test_longer_than_it_was(store: DiskStore, part: str) -> None:
    key = put(store)
    path = data_of(store, key) if part == "data" else manifest_of(store, key)
    with path.open("ab") as file:
        file.write(b"\0")
    assert_damage_is_a_miss(store, key)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.booleans(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit(tmp_path: Path, part: bool, where: float, bit: int) -> None:
    store = DiskStore(tmp_path / "store")
    key = put(store)
    path = data_of(store, key) if part else manifest_of(store, key)
    flip(path, int(where * path.stat().st_size), bit)
    assert_damage_is_a_miss(store, key)


def test_swapped_files_of_two_entries(store: DiskStore) -> None:
    one, two = put(store, 1, 2), put(store, 3, 4)
    for of in (data_of, manifest_of):
        a, b = of(store, one), of(store, two)
        raw_a, raw_b = a.read_bytes(), b.read_bytes()
        a.write_bytes(raw_b)
        b.write_bytes(raw_a)
        assert_damage_is_a_miss(store, one)
        assert_damage_is_a_miss(store, two)


def test_both_files_of_another_text_under_this_id(store: DiskStore) -> None:
    one, two = put(store, 1, 2), put(store, 3, 4)
    data_of(store, one).write_bytes(data_of(store, two).read_bytes())
    manifest_of(store, one).write_bytes(manifest_of(store, two).read_bytes())
    assert one.id in DiskStore(store.path).check().damaged
    assert_damage_is_a_miss(store, one)


def test_the_entry_of_another_model_under_this_id(store: DiskStore) -> None:
    mine = put(store)
    foreign = key_of(model="another")
    store.put(foreign, example_rows(TOKENS))
    data_of(store, mine).write_bytes(data_of(store, foreign).read_bytes())
    manifest_of(store, mine).write_bytes(manifest_of(store, foreign).read_bytes())
    assert DiskStore(store.path).check().damaged == (mine.id,)
    assert_damage_is_a_miss(store, mine)
    assert_same_rows(store.get(foreign), example_rows(TOKENS))


@pytest.mark.parametrize("length", [0, 1, 1 << 30, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_length_that_lies(store: DiskStore, length: int) -> None:
    key = put(store)
    raw = data_of(store, key).read_bytes()
    data_of(store, key).write_bytes(struct.pack("<Q", length) + raw[8:])
    assert_damage_is_a_miss(store, key)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"null", b"[1]", b"\xff\xfe", b"{" * 1000, b'{"layers": 1}', b"\0" * 500]
)
def test_garbage_for_a_manifest(store: DiskStore, raw: bytes) -> None:
    key = put(store)
    manifest_of(store, key).write_bytes(raw)
    assert_damage_is_a_miss(store, key)


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": -1},
        {"num_tokens": 1 << 62},
        {"num_tokens": "5"},
        {"layers": [[2, 8, 8]]},
        {"layers": [[-2, -8, 8], [1, 8, 6]]},
        {"layers": [[1.5, 8, 8], [1, 8, 6]]},
        {"layers": "no"},
        {"data_start": 0},
        {"data_start": 1},
        {"file_size": 0},
        {"checksums": {}},
        {"created": "now"},
        {"expires": -1},
        {"expires": "soon"},
        {"cost_seconds": float("nan")},
        {"cost_seconds": None},
        {"fingerprint": []},
        {"fingerprint": {"dtype": "float99"}},
    ],
    ids=str,
)
def test_a_sealed_manifest_that_makes_no_sense(store: DiskStore, change: dict[str, object]) -> None:
    key = put(store)
    manifest = json.loads(manifest_of(store, key).read_text())
    manifest.pop("manifest_checksum")
    body = json.dumps({**manifest, **change}, separators=(",", ":")).encode()[:-1]
    seal = f',"manifest_checksum":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()
    manifest_of(store, key).write_bytes(body + seal)
    assert key.id in DiskStore(store.path).check().damaged
    assert_damage_is_a_miss(store, key)


def test_a_data_file_that_is_a_folder(store: DiskStore) -> None:
    key = put(store)
    data_of(store, key).unlink()
    data_of(store, key).mkdir()
    with pytest.raises(CacheMiss):
        DiskStore(store.path).get(key)


def test_quarantine_is_bounded_and_deleting_empties_it(store: DiskStore) -> None:
    keys = [put(store, i) for i in range(12)]
    for key in keys:
        flip(data_of(store, key), -1)
        with pytest.raises(CacheMiss):
            store.get(key)
    quarantine = store.path / "quarantine"
    assert len(list(quarantine.iterdir())) == 16
    assert not store.delete(keys[-1].id)
    assert not list(quarantine.glob(f"{keys[-1].id}.*"))


def test_verify_never_still_checks_size_manifest_and_tokens(store: DiskStore) -> None:
    key = put(store)
    flip(data_of(store, key), -1)  # in the tokens
    with pytest.raises(CacheMiss):
        DiskStore(store.path, verify="never").get(key)
    with pytest.raises(ConfigError, match="verify"):
        DiskStore(store.path, verify="sometimes")  # type: ignore[arg-type]  # what is tested


# --- check --------------------------------------------------------------------------------------


def test_check_finds_and_mends(store: DiskStore) -> None:
    good, bad, headless, lone = put(store, 1), put(store, 2), put(store, 3), put(store, 4)
    flip(data_of(store, bad), 200)
    data_of(store, headless).unlink()
    manifest_of(store, lone).unlink()
    old = data_of(store, good).with_name(f"{good.id}.0.safetensors.partial")
    young = data_of(store, good).with_name(f"{good.id}.1.safetensors.partial")
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    with files.shared(store.path / "writers.lock"):  # somebody writes: only age tells what he has left
        report = store.check()
        assert set(report.damaged) == {bad.id, headless.id}
        assert {Path(name).name for name in report.orphans} == {old.name, data_of(store, lone).name}
        assert report.index == (lone.id,)
        assert not report.ok
        assert not report.fixed
        assert store.check() == report
        assert store.check(fix=True).fixed
        assert store.check().ok
        assert sorted(store.ids()) == [good.id]
        assert young.exists()
    assert store.check().orphans == (f"{good.id[:2]}/{young.name}",)
    assert store.check(fix=True).orphans
    assert not young.exists()
    assert store.check().ok


# --- writes that fail ---------------------------------------------------------------------------


def error_of(call: Callable[[], object]) -> StoreWriteError | None:
    try:
        call()
    except StoreWriteError as error:
        return error
    return None


def failing(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "read-only"),
        (errno.EIO, "check"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_write_that_fails_anywhere_leaves_nothing(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, number: int, advice: str, call: str, nth: int
) -> None:
    kept = put(store, 9)
    before = set(all_files(store))
    count = 0
    original = getattr(os, call)

    def fail(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == nth:
            raise failing(number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        error = error_of(lambda: put(store))
    if error is None:
        assert count < nth
    else:
        assert advice in str(error)
        assert error.errno == number
        entry = {manifest_of(store, key_of()), data_of(store, key_of())}
        # Only the sync of the folder after the last rename comes too late to take the entry back.
        assert set(all_files(store)) - before in (set(), entry)
        assert store.stats().write_failures == 1
    assert store.check().ok
    assert_same_rows(store.get(kept), example_rows((9,)))
    put(store)
    assert_same_rows(store.get(key_of()), example_rows(TOKENS))


def test_a_full_disk(tmp_path: Path) -> None:
    """A tiny file system of its own, where this process may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        store = DiskStore(tmp_path / "store")
        keys = []
        error = None
        while error is None and len(keys) < 50:
            keys.append(key_of(*range(len(keys), len(keys) + 20)))
            error = error_of(lambda: put(store, *keys[-1].tokens))
        assert "free some space" in str(error)
        keys.pop()
        assert keys
        assert store.check().ok
        assert not list(store.path.rglob("*.partial"))
        assert sorted(store.ids()) == sorted(key.id for key in keys)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        readonly = DiskStore(tmp_path / "store")
        assert_same_rows(readonly.get(keys[0]), example_rows(keys[0].tokens))
        with pytest.raises(StoreWriteError, match="read-only"):
            put(readonly, 1000)
        with pytest.raises(StoreWriteError, match="read-only"):
            readonly.delete(keys[0].id)
        assert readonly.check().ok
    finally:
        store.close()
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_damage_on_a_read_only_store_is_still_a_miss(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = put(store)
    flip(data_of(store, key), -1)

    def refuse(*_: object, **__: object) -> None:
        raise failing(errno.EROFS)

    monkeypatch.setattr("kvrag.store.folder.exclusive", refuse)
    with pytest.raises(CacheMiss):
        store.get(key)
    assert store.stats().damaged == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError):
        put(DiskStore(tmp_path / "file"))


def test_ctrl_c_during_a_write_leaves_nothing(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, 1)
    before = set(all_files(store))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(store)
    assert set(all_files(store)) == before


# --- several processes --------------------------------------------------------------------------

DRIVER = Path(__file__).with_name("killed_writers.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("rounds", "writers"), [(40, 1), (15, 3)])
def test_kill_9_of_writers_never_leaves_a_wrong_entry(store: DiskStore, rounds: int, writers: int) -> None:
    command = [sys.executable, DRIVER, store.path, str(rounds), str(writers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > rounds
    store.check(fix=True, grace_seconds=-1)
    assert store.check().ok
    assert {f.suffix for f in all_files(store)} <= {".json", ".safetensors"}


def test_the_lock_keeps_threads_apart(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with files.exclusive(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    descriptor = files.try_lock(tmp_path / "lock")
    assert descriptor is not None
    assert files.try_lock(tmp_path / "lock") is None
    os.close(descriptor)
