"""Another key for a store: everything readable under it, nothing under the one before, whenever it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.rekey import rekey
from kvrag.store.sealing import MasterKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

OLD, NEW, THIRD = (bytes([n]) * 32 for n in (1, 2, 3))
TEXTS = tuple((n, n + 1, 7) for n in range(8))


def key_of(tokens: tuple[int, ...]) -> EntryKey:
    return EntryKey(example_fingerprint(tenant=f"t{tokens[0] % 2}", dtype="bfloat16"), tokens)


def rows_of(tokens: tuple[int, ...]) -> object:
    return example_rows(tokens, dtype=torch.bfloat16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of eight entries of two tenants, half of them compressed."""
    for number, tokens in enumerate(TEXTS):
        with_zstd = "zstd" if number % 2 else None
        DiskStore(tmp_path / "store", key=OLD, compress=with_zstd).put(key_of(tokens), rows_of(tokens))
    return tmp_path / "store"


def assert_all_there(path: Path, key: bytes) -> None:
    store = DiskStore(path, key=key)
    for tokens in TEXTS:
        assert_same_rows(store.get(key_of(tokens)), rows_of(tokens))
    assert store.check().ok
    assert store.stats().entries == len(TEXTS)
    assert store.stats().damaged == 0


def test_all_entries_are_readable_with_the_new_key_and_only_with_it(path: Path) -> None:
    before = {file: file.read_bytes() for file in path.glob("*/*")}
    seen: list[int] = []
    assert rekey(path, OLD, NEW, progress=seen.append) == len(TEXTS)
    assert seen == list(range(1, len(TEXTS) + 1))
    assert_all_there(path, NEW)
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        DiskStore(path, key=OLD)
    after = {file: file.read_bytes() for file in path.glob("*/*")}
    assert set(after) == set(before)
    assert all(after[file] != before[file] for file in after)
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        rekey(path, OLD, NEW)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 8])
def test_interrupted_it_goes_on_where_it_was(path: Path, after: int) -> None:
    def stop(done: int) -> None:
        if done == after:
            raise Stopped

    with pytest.raises(Stopped):
        rekey(path, OLD, NEW, progress=stop)
    for key, message in ((OLD, "is encrypted with the key"), (NEW, "was interrupted")):
        with pytest.raises(ConfigError, match=message):
            DiskStore(path, key=key)
    assert DiskStore(path).check().ok  # verifying needs no key
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        rekey(path, THIRD, NEW)
    assert rekey(path, OLD, NEW) == len(TEXTS) - after
    assert_all_there(path, NEW)


def test_who_has_it_open_with_the_old_key_is_told_and_takes_nothing_for_damage(path: Path) -> None:
    store = DiskStore(path, key=OLD, keep_bytes=0)
    assert_same_rows(store.get(key_of(TEXTS[0])), rows_of(TEXTS[0]))
    rekey(path, OLD, NEW)
    for call in (
        lambda: store.get(key_of(TEXTS[0])),
        lambda: store.get(key_of(TEXTS[1]), by_layer=True),
        lambda: store.put(key_of((99, 1)), rows_of((99, 1))),
    ):
        with pytest.raises(ConfigError, match="is encrypted with the key"):
            call()
    assert store.stats().damaged == 0
    assert_all_there(path, NEW)


def test_damaged_entries_and_quarantine(path: Path) -> None:
    """Damage is left for `check` to find; what was set aside under the old key goes."""
    for number in (0, 1):
        file = path / key_of(TEXTS[number]).id[:2] / f"{key_of(TEXTS[number]).id}.sealed"
        raw = bytearray(file.read_bytes())
        raw[100] ^= 1
        file.write_bytes(raw)
    with pytest.raises(CacheMiss):
        DiskStore(path, key=OLD).get(key_of(TEXTS[0]))
    assert list(path.glob("quarantine/*"))
    assert rekey(path, OLD, NEW) == len(TEXTS) - 2
    assert not list(path.glob("quarantine/*"))
    store = DiskStore(path, key=NEW)
    assert store.check(fix=True).damaged == (key_of(TEXTS[1]).id,)
    assert store.check().ok
    assert_same_rows(store.get(key_of(TEXTS[2])), rows_of(TEXTS[2]))


def test_stores_that_have_no_key_or_another_are_refused(path: Path, tmp_path: Path) -> None:
    DiskStore(tmp_path / "plain").put(key_of(TEXTS[0]), rows_of(TEXTS[0]))
    for folder in (tmp_path / "plain", tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="is not encrypted"):
            rekey(folder, OLD, NEW)
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        rekey(path, THIRD, NEW)
    with pytest.raises(ConfigError, match="the new key is the old one"):
        rekey(path, OLD, OLD)
    assert json.loads((path / "store.json").read_text())["key_id"] == MasterKey(OLD).id
    assert_all_there(path, OLD)
