"""Kernels are tested on other numbers every time, and in memory that shows what nobody has written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_numbers(seed: int) -> int:
    """Begin the generators anew, after the fixed seed of all other tests; SEED=... repeats a run."""
    chosen = int(os.environ.get("SEED") or secrets.randbits(31))
    print(f"SEED={chosen}")  # shown when a test fails
    torch.manual_seed(chosen)
    return chosen


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote to is NaN, or the largest integer, so that reading it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
