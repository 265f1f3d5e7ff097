"""Run by test_processes.py in a process of its own: forks one that uses a store, kills it, looks on.

Usage: killed_stores.py FOLDER ROUNDS BUDGET (0: none). Every operation is told before it begins and when it
has ended, so that what was acknowledged is known. Prints the number of kills and of such entries found.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

TEXTS = [tuple(range(n, n + 4)) for n in range(12)]
KEYS = [EntryKey(example_fingerprint(), tokens) for tokens in TEXTS]
ROWS = [example_rows(tokens) for tokens in TEXTS]


def use_for_ever(folder: Path, budget: int | None, seed: int, pipe: int) -> None:
    store, chance = DiskStore(folder, budget_bytes=budget), random.Random(seed)
    while True:
        number = chance.randrange(len(KEYS))
        what = chance.choices("pdgsitf", (40, 15, 30, 3, 4, 4, 4))[0]
        os.write(pipe, f"b{what}{number}\n".encode())
        try:
            if what in "pt":
                store.put(KEYS[number], ROWS[number], ttl_seconds=None if what == "p" else 1e-3)
            elif what == "d":
                store.delete(KEYS[number].id)
            elif what == "g":
                assert_same_rows(store.get(KEYS[number]), ROWS[number])
            elif what == "s":
                store.sweep()
            elif what == "i":
                store.pin(KEYS[number].id, chance.random() < 0.3)
            else:
                store.close()
        except (CacheMiss, StoreWriteError):
            continue
        os.write(pipe, f"e{what}{number}\n".encode())


def killed(folder: Path, budget: int | None, seed: int) -> list[str]:
    """What a process said that was killed after some milliseconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            use_for_ever(folder, budget, seed, write)
        finally:
            os._exit(1)  # it only gets here by an error
    os.close(write)
    time.sleep(0.004 + 0.001 * (seed * 7 % 83))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    with os.fdopen(read) as said:
        return said.read().splitlines()


def follow(there: dict[int, bool | None], said: list[str]) -> None:
    """Keep account of what has to be there (True), must not be (False), or may be (None)."""
    for line in said:
        stage, what, number = line[0], line[1], int(line[2:])
        if what in "ptd":
            there[number] = None if stage == "b" or what == "t" else what == "p"


def look(folder: Path, budget: int | None, there: dict[int, bool | None]) -> int:
    found, store = 0, DiskStore(folder, budget_bytes=budget)
    sizes = sum(file.stat().st_size for key_id in store.ids() for file in store.files_of(key_id))
    assert budget is None or sizes <= budget, f"{sizes} bytes in a budget of {budget}"
    for number, key in enumerate(KEYS):
        try:
            assert_same_rows(store.get(key), ROWS[number])
        except CacheMiss:
            assert there[number] is not True or budget, f"{number} was acknowledged and is gone"
            continue
        assert there[number] is not False, f"{number} was deleted and is there"
        found += there[number] is True
    stats = store.stats()
    assert stats.damaged == 0
    assert stats.entries == len(list(store.ids()))
    store.sweep()
    report = store.check()
    assert report.ok, report
    assert not list(folder.rglob("*.partial"))
    store.close()
    return found


def main(folder: Path, rounds: int, budget: int | None) -> None:
    torch.set_num_threads(1)
    there: dict[int, bool | None] = dict.fromkeys(range(len(KEYS)), False)
    found = 0
    for number in range(rounds):
        follow(there, killed(folder, budget, number))
        found += look(folder, budget, there)
    print(rounds, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None)
