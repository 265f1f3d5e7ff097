"""Run by test_processes.py: one of many processes that use one folder at once, and believe nothing.

Usage: crowd.py FOLDER SEED SECONDS BUDGET. Prints what it did, as JSON.
"""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

TEXTS = [tuple(range(n, n + 8)) for n in range(40)]
KEYS = [EntryKey(example_fingerprint(tenant="ab"[n % 2]), tokens) for n, tokens in enumerate(TEXTS)]


def main(folder: Path, seed: int, seconds: float, budget: int) -> None:
    torch.set_num_threads(1)
    store = DiskStore(folder, budget_bytes=budget, quotas={"a": budget // 2})
    chance, done = random.Random(seed), Counter()
    held: list[tuple[object, int]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = min(int(chance.expovariate(0.12)), len(KEYS) - 1)  # some are asked for more than others
        key, rows = KEYS[number], example_rows(TEXTS[number])
        what = chance.choices(
            ("get", "put", "delete", "sweep", "pin", "check", "stats"), (60, 25, 6, 2, 3, 1, 3)
        )[0]
        done[what] += 1
        try:
            if what == "get":
                kv = store.get(key, by_layer=chance.random() < 0.5)
                assert_same_rows(kv, rows)
                done["hits"] += 1
                held = [*held[-5:], (kv, number)]
            elif what == "put":
                store.put(key, rows, cost_seconds=0.1, ttl_seconds=chance.choice((None, None, 0.2, 60)))
            elif what == "delete":
                store.delete(key.id)
            elif what == "sweep":
                store.sweep()
            elif what == "pin":
                store.pin(key.id, chance.random() < 0.2)
            elif what == "check":
                assert not store.check().damaged
            else:
                assert store.stats().num_bytes <= budget
        except CacheMiss:
            done["misses"] += 1
        except StoreWriteError as error:
            if "pinned" not in str(error):
                raise
            done["refused"] += 1
        for kv, n in held:  # evicted, deleted or replaced since: the rows stay
            if chance.random() < 0.1:
                assert_same_rows(kv, example_rows(TEXTS[n]))
    stats = store.stats()
    assert stats.damaged == 0
    store.close()
    print(json.dumps({**done, "evictions": stats.evictions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
