"""Test suites that ship with the interfaces: subclass one, supply the fixture, inherit every test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.errors import CacheMiss, ConfigError
from kvrag.segments import KV, LayerKV
from kvrag.store import layout
from kvrag.store.base import KVStore
from kvrag.store.folder import EntryFolder
from kvrag.store.found import find, locate
from kvrag.store.key import EntryKey, Fingerprint

FILLED_SHAPES = ((1, 4, 4),)
"""(K, D, Dv) of the layers of entries made by `fill`."""


def example_fingerprint(**changes: Any) -> Fingerprint:
    """A fingerprint of no real model."""
    example = Fingerprint(model="m", tokenizer="t", rope="r", dtype="float32", prefix="p")
    return replace(example, **changes)


def example_rows(
    tokens: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, int, int], ...] = ((2, 8, 8), (1, 8, 6)),
) -> KV:
    """Rows that depend on the tokens only: the same tokens give the same rows in every process.

    Args:
        tokens: not empty.
        dtype: element type of all rows.
        shapes: (K, D, Dv) of every layer.
    """
    generator = torch.Generator().manual_seed(hash(tokens) & 0xFFFF_FFFF)  # hashes of ints are not salted

    def rows(heads: int, size: int) -> torch.Tensor:
        return torch.randn(heads, len(tokens), size, generator=generator).to(dtype)

    return KV(tokens, tuple(LayerKV(rows(k, d), rows(k, v)) for k, d, v in shapes))


def assert_same_rows(found: KV, expected: KV) -> None:
    """Fail unless tokens and every bit of every row are equal."""
    assert found.tokens == expected.tokens
    assert len(found.layers) == len(expected.layers)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class KVStoreContract(ABC):
    """What every `KVStore` has to do; a store's tests are a subclass with a `make_store`."""

    @abstractmethod
    def make_store(self) -> KVStore:
        """An empty store; called once per test."""

    @pytest.fixture
    def store(self) -> Iterator[KVStore]:
        """The store under test; checked after every test."""
        store = self.make_store()
        yield store
        assert store.check().ok
        store.close()

    def put(self, store: KVStore, *tokens: int, **changes: str | int) -> tuple[EntryKey, KV]:
        """Put example rows; their key, and the rows."""
        key = EntryKey(example_fingerprint(**changes), tokens)
        kv = example_rows(tokens)
        store.put(key, kv)
        return key, kv

    def test_get_returns_every_bit(self, store: KVStore) -> None:
        """What was put comes back."""
        key, kv = self.put(store, 1, 2, 3)
        assert_same_rows(store.get(key), kv)
        assert_same_rows(store.get(EntryKey(key.fingerprint, (1, 2, 3))), kv)

    def test_get_by_layer_returns_every_bit(self, store: KVStore) -> None:
        """Layer after layer, in any order, by slices and with fewer rows: as if it were read at once."""
        key, kv = self.put(store, 1, 2, 3)
        found = store.get(key, by_layer=True)
        assert (len(found.layers), found.num_bytes) == (len(kv.layers), kv.num_bytes)
        assert found.to(torch.device("cpu")) is found
        first = store.get(key, by_layer=True).head(2)
        assert first.num_bytes == kv.head(2).num_bytes
        assert_same_rows(
            KV(kv.tokens, tuple(found.layers[i] for i in (-1, 0))), KV(kv.tokens, kv.layers[::-1])
        )
        assert_same_rows(KV(kv.tokens, found.layers[:1]), KV(kv.tokens, kv.layers[:1]))
        with pytest.raises(IndexError):
            found.layers[len(kv.layers)]
        assert_same_rows(found, kv)
        assert_same_rows(first, kv.head(2))
        assert_same_rows(first.head(1), kv.head(1))
        assert found.num_bytes_touched == found.num_bytes
        assert first.num_bytes_touched == first.num_bytes
        assert_same_rows(store.get(key), kv)
        assert_same_rows(store.get(key, by_layer=True), kv)

    def test_where_an_entry_lies(self, store: KVStore) -> None:
        """Before, between and after `put` and `delete`; asking loads nothing."""
        key = EntryKey(example_fingerprint(), (1, 2))
        for _ in range(2):
            place = locate(store, key)
            assert place is None or not place.is_certain
            hits = store.stats().hits
            store.put(key, example_rows(key.tokens))
            place = locate(store, key)
            assert place is not None
            assert store.stats().hits == hits
            found = find(store, key)
            assert_same_rows(found.kv, example_rows(key.tokens))
            assert found.tier
            assert found.seconds > 0
            assert store.delete(key.id)
        with pytest.raises(CacheMiss):
            find(store, key)

    def test_get_by_layer_may_miss_at_once(self, store: KVStore) -> None:
        """What is not there is a miss now, not when a layer is touched."""
        with pytest.raises(CacheMiss):
            store.get(EntryKey(example_fingerprint(), (1,)), by_layer=True)
        assert store.stats().misses == 1

    def test_layers_outlive_their_entry(self, store: KVStore) -> None:
        """A layer can be touched for the first time when its entry is gone, or was put again."""
        key, kv = self.put(store, 1, 2, 3)
        held = store.get(key, by_layer=True)
        store.delete(key.id)
        assert_same_rows(KV(kv.tokens, held.layers[:1]), KV(kv.tokens, kv.layers[:1]))
        store.put(key, kv)
        assert_same_rows(held, kv)
        assert_same_rows(store.get(key), kv)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
    def test_every_element_type(self, store: KVStore, dtype: str) -> None:
        """Rows keep their type, NaN and infinity included."""
        key = EntryKey(example_fingerprint(dtype=dtype), (5, 6, 7))
        kv = example_rows((5, 6, 7), dtype=getattr(torch, dtype))
        kv.layers[0].keys[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
        store.put(key, kv)
        assert_same_rows(store.get(key), kv)

    @pytest.mark.parametrize("num_tokens", [1, 2, 63, 257])
    def test_odd_lengths_and_layers_of_different_sizes(self, store: KVStore, num_tokens: int) -> None:
        """No length or head size is special."""
        tokens = tuple(range(num_tokens))
        key = EntryKey(example_fingerprint(dtype="bfloat16"), tokens)
        kv = example_rows(tokens, dtype=torch.bfloat16, shapes=((1, 3, 5), (4, 16, 8), (3, 7, 7)))
        store.put(key, kv)
        assert_same_rows(store.get(key), kv)

    def test_rows_that_are_not_contiguous(self, store: KVStore) -> None:
        """Views with strides are kept like their copies."""
        kv = example_rows((1, 2, 3, 4), shapes=((4, 6, 6),))
        strided = LayerKV(
            kv.layers[0].keys.transpose(0, 1).contiguous().transpose(0, 1), kv.layers[0].values[:, :, ::2]
        )
        key = EntryKey(example_fingerprint(), kv.tokens)
        store.put(key, KV(kv.tokens, (strided,)))
        assert_same_rows(store.get(key), KV(kv.tokens, (strided,)))

    def test_absent_is_a_counted_miss(self, store: KVStore) -> None:
        """No entry, no rows; also a KeyError."""
        key = EntryKey(example_fingerprint(), (1,))
        with pytest.raises(CacheMiss):
            store.get(key)
        with pytest.raises(KeyError):
            store.get(key)
        assert store.stats().misses == 2
        assert store.stats().hits == 0
        assert key not in store

    @pytest.mark.parametrize(
        "field", ["model", "tokenizer", "rope", "dtype", "prefix", "codec", "tenant", "layout"]
    )
    def test_other_fingerprints_never_meet(self, store: KVStore, field: str) -> None:
        """One field of the fingerprint differs: a miss."""
        self.put(store, 1, 2)
        changed: str | int = 99 if field == "layout" else "other"
        with pytest.raises(CacheMiss):
            store.get(EntryKey(example_fingerprint(**{field: changed}), (1, 2)))

    def test_other_tokens_never_meet(self, store: KVStore) -> None:
        """Neither a longer nor a shorter text finds the entry."""
        self.put(store, 1, 2)
        for tokens in ((1,), (1, 2, 3), (2, 1)):
            with pytest.raises(CacheMiss):
                store.get(EntryKey(example_fingerprint(), tokens))

    def test_put_refuses_rows_of_another_key(self, store: KVStore) -> None:
        """Tokens, element type and shapes have to fit."""
        kv = example_rows((1, 2, 3))
        with pytest.raises(ConfigError):
            store.put(EntryKey(example_fingerprint(), (1, 2, 4)), kv)
        with pytest.raises(ConfigError):
            store.put(EntryKey(example_fingerprint(dtype="float16"), (1, 2, 3)), kv)
        short = KV((1, 2, 3), (LayerKV(kv.layers[0].keys[:, :2], kv.layers[0].values),))
        with pytest.raises(ConfigError):
            store.put(EntryKey(example_fingerprint(), (1, 2, 3)), short)
        assert not list(store.ids())

    def test_put_again(self, store: KVStore) -> None:
        """Equal content twice is one entry."""
        key, kv = self.put(store, 1, 2, 3)
        store.put(key, kv)
        assert list(store.ids()) == [key.id]
        assert_same_rows(store.get(key), kv)

    def test_delete(self, store: KVStore) -> None:
        """A deleted entry is a miss, and can be put again."""
        key, kv = self.put(store, 1, 2, 3)
        other, other_kv = self.put(store, 4)
        held = store.get(key)
        assert store.delete(key.id)
        assert not store.delete(key.id)
        assert key not in store
        assert key.id not in store
        with pytest.raises(CacheMiss):
            store.get(key)
        assert_same_rows(held, kv)  # rows outlive their entry
        assert_same_rows(store.get(other), other_kv)
        store.put(key, kv)
        assert_same_rows(store.get(key), kv)

    @pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
    def test_only_ids_are_ids(self, store: KVStore, name: str) -> None:
        """Names that are no ids are absent, whatever they point at."""
        assert name not in store
        assert not store.delete(name)
        assert 5 not in store

    def test_ids_and_stats(self, store: KVStore) -> None:
        """Sizes follow what is there."""
        keys = [self.put(store, i, i + 1)[0] for i in range(5)]
        assert sorted(store.ids()) == sorted(key.id for key in keys)
        assert all(key in store and key.id in store for key in keys)
        stats = store.stats()
        assert stats.entries == 5
        assert stats.num_bytes >= 5 * example_rows((0, 1)).num_bytes
        store.get(keys[0])
        store.delete(keys[0].id)
        assert store.stats().entries == 4
        assert store.stats().hits == 1

    def test_ids_may_be_deleted_while_listed(self, store: KVStore) -> None:
        """As reconciling does."""
        for i in range(10):
            self.put(store, i)
        assert all(store.delete(key_id) for key_id in store.ids())
        assert not list(store.ids())

    def test_many_threads(self, store: KVStore) -> None:
        """Puts, gets and deletes of few keys at once: right rows or a miss, never anything else."""

        def work(number: int) -> None:
            tokens = (number % 3, 7)
            key = EntryKey(example_fingerprint(), tokens)
            if number % 5 == 4:
                store.delete(key.id)
                return
            store.put(key, example_rows(tokens))
            with suppress(CacheMiss):
                assert_same_rows(store.get(key, by_layer=number % 2 == 0), example_rows(tokens))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(60)))

    def test_keys_are_values(self, store: KVStore) -> None:
        """A key made elsewhere names the same entry."""
        key, kv = self.put(store, 1, 2, 3)
        assert_same_rows(store.get(EntryKey(replace(key.fingerprint), tuple(key.tokens))), kv)


def fill(path: Path, count: int, *, num_tokens: int = 4, tenants: Sequence[str] = ("",)) -> list[EntryKey]:
    """Make many small entries in an empty folder, quickly: nothing is synced, and no index is made.

    Args:
        path: of the folder.
        count: how many.
        num_tokens: of every entry; above 1, so that no two are alike.
        tenants: of the entries, in turns.

    Returns:
        The keys; `example_rows(key.tokens, shapes=FILLED_SHAPES)` are their rows.
    """
    folder = EntryFolder(path)
    keys = []
    for prefix in range(256):
        (path / f"{prefix:02x}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        tokens = (number // 50_000, number % 50_000, *range(num_tokens - 2))
        key = EntryKey(example_fingerprint(tenant=tenants[number % len(tenants)]), tokens)
        manifest, parts = layout.encode(key, example_rows(tokens, shapes=FILLED_SHAPES), 1e9 + number)
        manifest_file, data_file = folder.files(key.id)
        data_file.write_bytes(b"".join(parts))
        manifest_file.write_bytes(layout.dump_manifest(manifest))
        keys.append(key)
    return keys
