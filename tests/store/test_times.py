"""Times to live, under clocks that are set."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store.clock import StoreClock
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

KEY = EntryKey(example_fingerprint(), (1, 2))
OTHER = EntryKey(example_fingerprint(), (3, 4))


class Wall:
    """A clock on the wall that anybody can set."""

    def __init__(self, now: float = 1.8e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def store(tmp_path: Path, wall: Wall) -> DiskStore:
    return DiskStore(tmp_path, wall_clock=wall)


def put(store: DiskStore, key: EntryKey = KEY, ttl: float | None = 100.0) -> None:
    store.put(key, example_rows(key.tokens), ttl_seconds=ttl)


def is_there(store: DiskStore, key: EntryKey = KEY) -> bool:
    try:
        assert_same_rows(store.get(key), example_rows(key.tokens))
    except CacheMiss:
        assert key not in store
        return False
    assert key in store
    return True


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_expired_is_a_miss_and_swept(tmp_path: Path, wall: Wall, keep_bytes: int) -> None:
    store = DiskStore(tmp_path, wall_clock=wall, keep_bytes=keep_bytes)
    put(store)
    put(store, OTHER, None)
    wall.now += 99
    assert is_there(store)
    wall.now += 2
    assert not is_there(store)
    assert (store.stats().expired, store.stats().misses, store.stats().damaged) == (1, 1, 0)
    assert not (tmp_path / "quarantine").exists()
    report = store.sweep()
    assert report.expired == (KEY.id,)
    assert report.num_bytes > 1000
    assert list(store.ids()) == [OTHER.id]
    assert is_there(store, OTHER)
    assert store.check().ok


def test_put_again_lives_again(store: DiskStore, wall: Wall) -> None:
    put(store)
    wall.now += 200
    assert not is_there(store)
    put(store)
    assert is_there(store)
    assert (store.stats().misses, store.stats().damaged) == (1, 0)
    wall.now += 60
    put(store)  # sixty seconds later: a hundred more
    wall.now += 60
    assert is_there(store)
    put(store, ttl=None)
    wall.now += 1e6
    assert is_there(store)
    assert store.check().ok
    assert (info := store.info(KEY.id)) is not None
    assert info.expires is None


def test_the_end_survives_the_index(store: DiskStore, wall: Wall) -> None:
    put(store)
    store.rebuild()
    assert (info := store.info(KEY.id)) is not None
    assert info.expires == wall.now + 100
    wall.now += 101
    assert store.sweep().expired == (KEY.id,)


def test_a_clock_set_back_keeps_nothing_for_ever(store: DiskStore, wall: Wall) -> None:
    put(store)
    wall.now += 50
    assert is_there(store)
    wall.now -= 1e8
    assert is_there(store)
    put(store, OTHER)
    wall.now += 51
    assert not is_there(store)
    assert is_there(store, OTHER)
    wall.now += 51
    assert not is_there(store, OTHER)


@pytest.mark.parametrize("index_is_lost", [False, True])
def test_a_clock_set_back_while_nobody_looked(tmp_path: Path, wall: Wall, index_is_lost: bool) -> None:
    with_index = DiskStore(tmp_path, wall_clock=wall)
    put(with_index)
    with_index.close()
    if index_is_lost:
        (tmp_path / "index.sqlite").unlink()
    wall.now -= 1e8
    for _ in range(3):
        later = DiskStore(tmp_path, wall_clock=wall)
        assert is_there(later)
        later.sweep()
        later.close()
        wall.now += 30
    wall.now += 11
    later = DiskStore(tmp_path, wall_clock=wall)
    later.stats()
    assert not is_there(later)


def test_a_clock_far_ahead_expires_once_and_not_for_ever(store: DiskStore, wall: Wall) -> None:
    put(store)
    put(store, OTHER, None)
    wall.now += 1e9
    assert not is_there(store)
    assert is_there(store, OTHER)
    wall.now -= 1e9
    assert not is_there(store)
    put(store)
    assert is_there(store)
    wall.now += 99
    assert is_there(store)
    wall.now += 2
    assert not is_there(store)


def test_opening_again_and_again_does_not_make_time_pass(tmp_path: Path, wall: Wall) -> None:
    store = DiskStore(tmp_path, wall_clock=wall)
    put(store)
    wall.now -= 1000
    for number in range(20):
        store = DiskStore(tmp_path, wall_clock=wall)
        put(store, EntryKey(example_fingerprint(), (9, number)), None)
        assert is_there(store)
        store.close()


def test_two_processes_with_clocks_apart_agree(tmp_path: Path) -> None:
    early, late = Wall(1.8e9), Wall(1.8e9 + 5000)
    one, two = DiskStore(tmp_path, wall_clock=early), DiskStore(tmp_path, wall_clock=late)
    put(two)
    assert is_there(one)
    early.now += 101
    assert not is_there(one)


@given(steps=st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), max_size=30))
def test_the_stores_time_never_goes_back(steps: list[tuple[float, bool]]) -> None:
    wall = Wall()
    clocks = [StoreClock(wall), StoreClock(wall)]
    latest = 0.0
    for step, merges in steps:
        wall.now = max(0.0, wall.now + step)
        now = clocks[0].now()
        assert now >= latest - 1.0
        assert now >= wall.now
        latest = max(now, latest)
        if merges:
            clocks[1].merge(*clocks[0].state())
            assert clocks[1].now() >= clocks[0].now() - 1.0
    state = clocks[0].state()
    reopened = StoreClock(wall)
    reopened.merge(*state)
    assert abs(reopened.now() - clocks[0].now()) <= 1.0


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none(store: DiskStore, ttl: float) -> None:
    with pytest.raises(ConfigError, match="ttl_seconds"):
        put(store, ttl=ttl)
    with pytest.raises(ConfigError, match="cost_seconds"):
        store.put(KEY, example_rows(KEY.tokens), cost_seconds=ttl or -1.0)
    assert KEY not in store
