"""Run by test_disk.py in a process of its own: forks writers, kills them, looks at what they left.

Usage: killed_writers.py FOLDER ROUNDS WRITERS. Prints the number of whole entries that were found.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kvrag.errors import CacheMiss
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

SHAPES = ((4, 64, 64),) * 4
TEXTS = [tuple(range(n, n + 40)) for n in range(7)]
ROWS = {tokens: example_rows(tokens, shapes=SHAPES) for tokens in TEXTS}


def write_for_ever(folder: Path, seed: int) -> None:
    store, random_numbers = DiskStore(folder), random.Random(seed)
    while True:
        tokens = random_numbers.choice(TEXTS)
        key = EntryKey(example_fingerprint(), tokens)
        if random_numbers.random() < 0.3:
            store.delete(key.id)
        elif random_numbers.random() < 0.5:
            store.put(key, ROWS[tokens])
        else:
            batch = random_numbers.sample(TEXTS, 3)
            store.put_many([(EntryKey(example_fingerprint(), text), ROWS[text]) for text in batch])


def start(folder: Path, seed: int) -> int:
    child = os.fork()
    if child == 0:
        write_for_ever(folder, seed)
    return child


def whole_entries(store: DiskStore) -> int:
    found = 0
    for tokens in TEXTS:
        try:
            kv = store.get(EntryKey(example_fingerprint(), tokens))
        except CacheMiss:
            continue
        assert_same_rows(kv, ROWS[tokens])
        found += 1
    return found


def main(folder: Path, rounds: int, writers: int) -> None:
    torch.set_num_threads(1)
    found = 0
    for number in range(rounds):
        children = [start(folder, number * writers + i) for i in range(writers)]
        end = time.monotonic() + 0.01 + 0.003 * (number * 7 % 23)
        store = DiskStore(folder)
        while time.monotonic() < end:
            found += whole_entries(store)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found += whole_entries(store)
        assert store.stats().damaged == 0
        assert not store.check().damaged
    print(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
