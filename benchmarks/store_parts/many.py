"""Many small entries: opening, looking one up, sweeping, counting."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

from store_parts.corpus import timed

from kvrag.segments import KV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import example_fingerprint, example_rows

_SHAPES = ((1, 4, 4),)
_LOOK_UPS = 2000


def measure(folder: Path, count: int) -> dict[str, object]:
    """Seconds of each, entries in the page cache; look-ups in random order, of a store just opened."""
    keys = [EntryKey(example_fingerprint(), (number, number + 1)) for number in range(count)]
    filling = timed(lambda: _fill(folder, keys))
    random.Random(3).shuffle(keys)
    opening = [timed(lambda: DiskStore(folder).stats()) for _ in range(9)]
    store = DiskStore(folder)
    assert store.stats().entries == count
    gets, tests = [], []
    for key in keys[:_LOOK_UPS]:
        gets.append(timed(lambda key=key: store.get(key)))  # type: ignore[misc]
        tests.append(timed(lambda key=key: key in store))  # type: ignore[misc]
    rebuilding = timed(store.rebuild)
    return {
        "entries": count,
        "filling_unsynced": filling,
        "open_and_stats": median(opening),
        "get_p50": median(gets),
        "get_p99": quantiles(gets, n=100)[98],
        "contains_p50": median(tests),
        "contains_p99": quantiles(tests, n=100)[98],
        "stats": median(timed(store.stats) for _ in range(9)),
        "list_all": timed(lambda: sum(1 for _ in store.entries())),
        "sweep": timed(store.sweep),
        "rebuild_index": rebuilding,
        "date": time.strftime("%Y-%m-%d"),
    }


def _fill(folder: Path, keys: list[EntryKey]) -> None:
    """Put them all; without syncs, which are measured elsewhere and would take an hour here."""
    store = DiskStore(folder)
    with mock.patch("os.fsync", return_value=None):
        for start in range(0, len(keys), 64):
            store.put_many([(key, _rows(key)) for key in keys[start : start + 64]])
    store.close()


def _rows(key: EntryKey) -> KV:
    return example_rows(key.tokens, shapes=_SHAPES)
