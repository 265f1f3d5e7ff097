"""Entries that are encrypted before they leave the process, in a bucket and between tiers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

MASTER, OTHER = bytes(range(32)), bytes(range(1, 33))
TOKENS = tuple(range(100, 300))
KEY = EntryKey(example_fingerprint(dtype="bfloat16", model="digest-of-weights"), TOKENS)
ROWS = example_rows(TOKENS, dtype=torch.bfloat16)


class TestSealedObjects(KVStoreContract):
    def make_store(self) -> ObjectStore:
        return ObjectStore(f"memory://sealed-{uuid.uuid4().hex}", compress="zstd", master_key=MASTER)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_nothing_readable_leaves_the_process(tmp_path: Path, compress: Any) -> None:
    ObjectStore(f"file://{tmp_path}", compress=compress, master_key=MASTER).put(KEY, ROWS)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert token_bytes(TOKENS)[:32] not in written
    assert b"digest-of-weights" not in written
    assert_same_rows(ObjectStore(f"file://{tmp_path}", master_key=MASTER).get(KEY, by_layer=True), ROWS)


def test_other_keys_read_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    ObjectStore(url, master_key=MASTER).put(KEY, ROWS)
    with pytest.raises(ConfigError, match="open it with its key"):
        ObjectStore(url).get(KEY)
    assert_same_rows(ObjectStore(url, master_key=MASTER).get(KEY), ROWS)
    with pytest.raises(CacheMiss):
        ObjectStore(url, master_key=OTHER).get(KEY)


def test_what_is_not_encrypted_is_not_read_by_who_has_a_key(tmp_path: Path) -> None:
    ObjectStore(f"file://{tmp_path}").put(KEY, ROWS)
    with pytest.raises(CacheMiss):
        ObjectStore(f"file://{tmp_path}", master_key=MASTER).get(KEY)


def test_entries_move_between_tiers_as_they_are(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'bucket'}"
    with_both = TieredStore([DiskStore(tmp_path / "a", key=MASTER), ObjectStore(url, master_key=MASTER)])
    with_both.put(KEY, ROWS)
    with_both.close()
    disk = DiskStore(tmp_path / "b", key=MASTER)
    elsewhere = TieredStore([disk, ObjectStore(url, master_key=MASTER)])
    assert_same_rows(elsewhere.get(KEY), ROWS)
    elsewhere.close()
    (here, there) = (next((tmp_path / name).glob("*/*.sealed")).read_bytes() for name in "ab")
    assert here == there
    assert_same_rows(DiskStore(tmp_path / "b", key=MASTER).get(KEY), ROWS)
