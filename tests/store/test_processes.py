"""Processes that are killed, and many at once: the contract of docs/store.md."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kvrag.store.disk import DiskStore

HERE = Path(__file__).parent
BUDGET = 40_000


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("rounds", "budget"), [(120, 0), (90, 9_000)], ids=["unbounded", "budget"])
def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(
    tmp_path: Path, rounds: int, budget: int
) -> None:
    command = [sys.executable, HERE / "killed_stores.py", tmp_path / "store", str(rounds), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, found = map(int, done.stdout.split())
    assert kills == rounds
    assert found > rounds


@pytest.mark.slow
def test_eight_processes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    command = [sys.executable, HERE / "crowd.py", folder]
    crowd = [
        subprocess.Popen(
            [*command, str(seed), "20", str(BUDGET)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(8)
    ]
    did: Counter[str] = Counter()
    for process in crowd:
        out, error = process.communicate(timeout=400)
        assert process.returncode == 0, error[-3000:]
        did.update(json.loads(out))
    assert did["hits"] > 100
    assert did["evictions"] > 0
    assert did["put"] > 100
    store = DiskStore(folder)
    assert store.stats().num_bytes <= BUDGET
    assert store.stats().entries == len(list(store.ids()))
    store.sweep()
    assert store.check().ok
    assert not list(folder.rglob("*.partial"))
    assert not (folder / "quarantine").exists()
    store.close()
