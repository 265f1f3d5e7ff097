import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.segments import KV, LayerKV
from kvrag.store.base import KVStore
from kvrag.store.eviction import EVICTION
from kvrag.store.held import Held, HeldEntries
from kvrag.store.key import EntryKey
from kvrag.store.lazy import MappedLayers
from kvrag.store.memory import MemoryStore, MemoryTier
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

ROWS = example_rows((0, 1))
SIZE = ROWS.num_bytes


class TestMemoryStore(KVStoreContract):
    def make_store(self) -> KVStore:
        return MemoryStore()


class TestMemoryTier(KVStoreContract):
    def make_store(self) -> KVStore:
        return MemoryTier(1 << 20)


class TestPinnedMemoryTier(KVStoreContract):
    def make_store(self) -> KVStore:
        return MemoryTier(1 << 20, pinned=True, eviction="lru")


def key_of(number: int, tenant: str = "") -> EntryKey:
    return EntryKey(example_fingerprint(tenant=tenant), (0, number))


def put(tier: MemoryTier, number: int, tenant: str = "") -> EntryKey:
    key = key_of(number, tenant)
    tier.put(key, example_rows(key.tokens))
    return key


def present(tier: MemoryTier, numbers: range) -> list[int]:
    return [number for number in numbers if key_of(number) in tier]


def test_the_least_recently_used_goes() -> None:
    tier = MemoryTier(3 * SIZE, eviction="lru")
    keys = [put(tier, i) for i in range(3)]
    tier.get(keys[0])
    put(tier, 3)
    assert present(tier, range(4)) == [0, 2, 3]
    assert (tier.stats().evictions, tier.stats().evicted_bytes) == (1, SIZE)


def test_what_was_costly_to_read_stays() -> None:
    tier = MemoryTier(2 * SIZE)
    for number, cost in ((0, 9.0), (1, 0.1), (2, 0.2)):
        key = key_of(number)
        tier.put(key, example_rows(key.tokens), cost_seconds=cost)
    assert present(tier, range(3)) == [0, 2]


def test_pinned_entries_stay_and_may_leave_no_room() -> None:
    tier = MemoryTier(2 * SIZE, eviction="lru")
    assert not tier.pin(key_of(0).id)
    first, second = put(tier, 0), put(tier, 1)
    assert tier.pin(first.id)
    put(tier, 2)
    assert present(tier, range(3)) == [0, 2]
    assert tier.pin(key_of(2).id)
    with pytest.raises(StoreWriteError, match="unpin"):
        put(tier, 3)
    assert tier.keep(second, example_rows(second.tokens)) is None
    tier.pin(first.id, False)
    put(tier, 3)
    assert present(tier, range(4)) == [2, 3]
    assert tier.stats().write_failures == 1


def test_a_tenant_evicts_its_own_within_its_quota() -> None:
    tier = MemoryTier(10 * SIZE, quotas={"a": 2 * SIZE})
    other = put(tier, 0, "b")
    keys = [put(tier, i, "a") for i in range(5)]
    assert sum(key in tier for key in keys) == 2
    assert other in tier
    with pytest.raises(StoreWriteError):
        MemoryTier(10 * SIZE, quotas={"": SIZE - 1}).put(key_of(1), example_rows((0, 1)))


def test_too_large_is_refused_and_evicts_nobody() -> None:
    tier = MemoryTier(2 * SIZE)
    key = put(tier, 0)
    large = EntryKey(example_fingerprint(), tuple(range(5)))
    with pytest.raises(StoreWriteError, match="budget"):
        tier.put(large, example_rows(large.tokens))
    assert key in tier
    assert large not in tier


def test_entries_end_and_are_described() -> None:
    tier = MemoryTier(10 * SIZE)
    key = key_of(1)
    tier.put(key, example_rows(key.tokens), cost_seconds=2.0, ttl_seconds=1000)
    tier.get(key)
    info = tier.info(key.id)
    assert info is not None
    assert (info.hits, info.cost_seconds, info.num_bytes, info.num_tokens) == (1, 2.0, SIZE, 2)
    assert list(tier.entries()) == [info]
    assert info.expires is not None
    tier.put(key, example_rows(key.tokens), ttl_seconds=1e-9)
    assert key not in tier
    assert tier.info(key.id) is None
    with pytest.raises(CacheMiss):
        tier.get(key)
    assert tier.stats().num_bytes == 0


def test_it_holds_copies_and_lets_go_of_them() -> None:
    tier = MemoryTier(SIZE)
    rows = example_rows((0, 1))
    tier.put(key_of(1), rows)
    found = tier.get(key_of(1))
    assert found.layers[0].keys.data_ptr() != rows.layers[0].keys.data_ptr()
    watched = weakref.ref(found.layers[0].keys)
    put(tier, 2)
    assert_same_rows(found, rows)
    del found
    gc.collect()
    assert watched() is None
    tier.close()
    assert not list(tier.ids())
    put(tier, 2)


def test_rows_that_cannot_be_read_take_no_room() -> None:
    def damaged(number: int) -> LayerKV:
        raise CacheMiss(f"layer {number} is damaged")

    tier = MemoryTier(SIZE)
    sizes = [layer.num_bytes for layer in ROWS.layers]
    with pytest.raises(CacheMiss, match="damaged"):
        tier.put(key_of(1), KV((0, 1), MappedLayers(2, sizes, damaged, lambda: None, lambda _: None)))
    put(tier, 1)
    assert tier.stats().num_bytes == SIZE


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="budget"):
        MemoryTier(-1)
    with pytest.raises(ConfigError, match="eviction"):
        MemoryTier(1, eviction="no")


@pytest.mark.gpu
def test_rows_lie_on_the_device() -> None:
    tier = MemoryTier(SIZE, device="cuda")
    put(tier, 1)
    found = tier.get(key_of(1))
    assert found.device.type == "cuda"
    assert_same_rows(found.to(torch.device("cpu")), example_rows((0, 1)))


STEPS = st.lists(
    st.tuples(st.sampled_from("use add pin loose drop".split()), st.integers(0, 7), st.integers(1, 9)),
    max_size=60,
)


@given(STEPS, st.sampled_from(sorted(EVICTION)), st.integers(0, 20), st.integers(0, 20))
def test_never_more_than_the_budget_and_the_lowest_number_goes(
    steps: list[tuple[str, int, int]], policy: str, budget: int, quota: int
) -> None:
    held = HeldEntries(budget, {"1": quota}, EVICTION[policy])
    for what, number, size in steps:
        key_id, tenant = str(number), str(number % 2)
        before = dict(held.entries)
        if what == "add" and key_id not in before:
            if held.reserve(tenant, size):
                held.add(key_id, Held(ROWS, size, tenant, 0.0, 0.0))
            else:
                pinned = [e for e in before.values() if e.pinned]
                mine = sum(e.num_bytes for e in pinned if e.tenant == tenant)
                limit = quota if tenant == "1" else budget
                assert mine + size > limit or sum(e.num_bytes for e in pinned) + size > budget
                assert held.entries == before
        elif key_id in before:
            if what == "use":
                held.use(key_id, is_hit=True)
            elif what == "drop":
                held.remove(key_id)
            elif what in ("pin", "loose"):
                held.pin(key_id, what == "pin")
        gone = [e for k, e in before.items() if k not in held.entries]
        assert what == "drop" or not any(e.pinned for e in gone)
        if what == "add" and gone and tenant == "0":
            left = [e.number for k, e in before.items() if k in held.entries and not e.pinned]
            assert max(e.number for e in gone) <= min(left, default=float("inf"))
        assert held.num_bytes == sum(e.num_bytes for e in held.entries.values()) <= budget
        assert sum(e.num_bytes for e in held.entries.values() if e.tenant == "1") <= quota or not quota
