from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

SIZE = 1600  # an entry of these has 1.4 to 1.5 kB


def key_of(number: int, tenant: str = "") -> EntryKey:
    return EntryKey(example_fingerprint(tenant=tenant), (number, number + 1))


def put(store: DiskStore, number: int, tenant: str = "", cost: float = 0.0) -> EntryKey:
    key = key_of(number, tenant)
    store.put(key, example_rows(key.tokens), cost_seconds=cost)
    return key


def there(store: DiskStore, *keys: EntryKey) -> list[bool]:
    return [key in store for key in keys]


def test_the_budget_is_kept_and_the_least_used_goes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=4 * SIZE, eviction="lru")
    keys = [put(store, n) for n in range(4)]
    store.get(keys[0])
    keys.append(put(store, 4))
    assert there(store, *keys) == [True, False, True, True, True]
    stats = store.stats()
    assert stats.evictions == 1
    assert 1300 < stats.evicted_bytes < SIZE
    assert stats.num_bytes <= 4 * SIZE
    assert not list(tmp_path.glob(f"??/{keys[1].id}*"))  # erased, not only forgotten
    assert store.check().ok


def test_the_budget_holds_for_others_and_after_opening_again(tmp_path: Path) -> None:
    first = DiskStore(tmp_path, budget_bytes=3 * SIZE)
    keys = [put(first, n) for n in range(3)]
    for _ in range(3):
        first.get(keys[0])
        first.get(keys[2])
    first.close()
    second = DiskStore(tmp_path, budget_bytes=3 * SIZE)
    put(second, 3)
    assert there(second, *keys) == [True, False, True]
    assert there(first, *keys) == [True, False, True]
    assert first.stats().entries == 3


def test_costly_entries_stay_longer(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=3 * SIZE, eviction="gdsf")
    dear, cheap, middle = put(store, 0, cost=9.0), put(store, 1, cost=0.1), put(store, 2, cost=1.0)
    put(store, 3, cost=1.0)
    assert there(store, dear, cheap, middle) == [True, False, True]
    assert (info := store.info(dear.id)) is not None
    assert info.cost_seconds == 9.0


def test_aging_goes_on_after_opening_again(tmp_path: Path) -> None:
    """Without a floor that lasts, what was loved once would stay for ever."""
    store = DiskStore(tmp_path, budget_bytes=2 * SIZE, eviction="lfu-da")
    old = put(store, 0)
    for _ in range(5):
        store.get(old)
    store.close()
    for number in range(1, 12):
        store = DiskStore(tmp_path, budget_bytes=2 * SIZE, eviction="lfu-da")
        put(store, number)
        store.close()
    assert old not in store


def test_another_policy_weighs_anew(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=3 * SIZE, eviction="lru")
    keys = [put(store, n, cost=c) for n, c in enumerate((9.0, 0.1, 1.0))]
    store.get(keys[1])
    store.close()
    other = DiskStore(tmp_path, budget_bytes=3 * SIZE, eviction="gdsf")
    put(other, 3, cost=1.0)
    assert there(other, *keys) == [True, False, True]


def test_pinned_entries_stay_and_a_store_full_of_them_says_so(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=2 * SIZE)
    keys = [put(store, n) for n in range(2)]
    assert all(store.pin(key.id) for key in keys)
    with pytest.raises(StoreWriteError, match="unpin or delete"):
        put(store, 2)
    assert there(store, *keys) == [True, True]
    assert store.stats().write_failures == 1
    assert store.check().ok
    assert store.pin(keys[0].id, False)
    put(store, 2)
    assert there(store, *keys) == [False, True]
    assert not store.pin(keys[0].id)
    assert not store.pin("nothing")


@pytest.mark.parametrize("lost", ["rebuild", "removed"])
def test_pins_survive_the_index(tmp_path: Path, lost: str) -> None:
    store = DiskStore(tmp_path, budget_bytes=3 * SIZE, eviction="lru")
    keys = [put(store, n) for n in range(3)]
    store.pin(keys[0].id)
    if lost == "rebuild":
        assert store.rebuild() == 3
    else:
        store.close()
        (tmp_path / "index.sqlite").unlink()
    put(store, 3)
    assert there(store, *keys) == [True, False, True]
    assert (info := store.info(keys[0].id)) is not None
    assert info.pinned


def test_a_pin_outlives_damage_and_not_deletion(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    key = put(store, 0)
    store.pin(key.id)
    data = store.files_of(key.id)[1]
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert store.check(fix=True).damaged == (key.id,)
    put(store, 0)
    assert (info := store.info(key.id)) is not None
    assert info.pinned
    assert f"disk: {key.id[:2]}/{key.id}.pin" in store.delete(key.id).erased
    put(store, 0)
    assert (info := store.info(key.id)) is not None
    assert not info.pinned


def test_what_is_too_large_is_refused_before_anything_goes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=2 * SIZE)
    key = put(store, 0)
    big = EntryKey(example_fingerprint(), tuple(range(100)))
    with pytest.raises(StoreWriteError, match="larger than the store's budget"):
        store.put(big, example_rows(big.tokens))
    assert there(store, key) == [True]
    assert store.stats().evictions == 0


def test_a_tenant_that_is_full_evicts_its_own(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, quotas={"a": 2 * SIZE}, eviction="lru")
    others = [put(store, n, "b") for n in range(4)]
    mine = [put(store, n, "a") for n in range(3)]
    assert there(store, *mine) == [False, True, True]
    assert all(there(store, *others))
    big = EntryKey(example_fingerprint(tenant="a"), tuple(range(100)))
    with pytest.raises(StoreWriteError, match="quota of tenant 'a'"):
        store.put(big, example_rows(big.tokens))
    assert {info.tenant for info in store.entries("a")} == {"a"}
    assert len(list(store.entries("a"))) == 2
    assert len(list(store.entries())) == 6
    assert store.check().ok


def test_quota_and_budget_at_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, quotas={"a": 2 * SIZE}, budget_bytes=3 * SIZE, eviction="lru")
    other = put(store, 0, "b")
    mine = [put(store, n, "a") for n in range(3)]
    assert there(store, other, *mine) == [True, False, True, True]
    put(store, 1, "b")
    assert there(store, other, *mine) == [False, False, True, True]
    assert store.check().ok


def test_a_lowered_budget_is_kept_by_a_sweep(tmp_path: Path) -> None:
    keys = [put(DiskStore(tmp_path), n) for n in range(5)]
    store = DiskStore(tmp_path, budget_bytes=2 * SIZE, eviction="lru")
    report = store.sweep()
    assert set(report.evicted) == {key.id for key in keys[:3]}
    assert report.num_bytes == store.stats().evicted_bytes
    assert store.stats().entries == 2
    assert not store.sweep().evicted


def test_readers_of_evicted_entries_are_not_hurt(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget_bytes=2 * SIZE, eviction="lru")
    key = put(store, 0)
    whole, lazy = store.get(key), DiskStore(tmp_path).get(key, by_layer=True)
    for number in range(1, 6):
        put(store, number)
    assert key not in store
    assert_same_rows(whole, example_rows(key.tokens))
    assert_same_rows(lazy, example_rows(key.tokens))


@pytest.mark.parametrize(
    "settings", [{"budget_bytes": 0}, {"quotas": {"a": -1}}, {"eviction": "none"}], ids=str
)
def test_settings_that_cannot_work(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DiskStore(tmp_path, **settings)  # type: ignore[arg-type]  # what is tested


def test_threads_that_put_and_count_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are written by a thread of their own at every load, and wait for the lock that puts hold."""
    monkeypatch.setattr("kvrag.store.hits._MAX_HITS", 1)
    store = DiskStore(tmp_path, budget_bytes=4 * SIZE)

    def work(number: int) -> None:
        key = put(store, number % 7)
        with suppress(CacheMiss):
            assert_same_rows(store.get(key), example_rows(key.tokens))
        if number % 10 == 0:
            (tmp_path / "index.sqlite").unlink(missing_ok=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(80)))
    assert store.stats().num_bytes <= 4 * SIZE
    store.close()
    assert store.check().ok
