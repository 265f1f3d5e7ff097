"""What every test runs under: no network, few threads, fixed seeds."""

from __future__ import annotations

import os

# Read when the libraries are imported, so before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ANONYMIZED_TELEMETRY"] = "False"
os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" for the tests marked gpu

import random

import hypothesis
import numpy as np
import pytest
import torch

# Tests are small; more threads only make them wait for each other, and so do processes side by side.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _WORKERS)))

# A slow machine is no failure, and a red run can be repeated from what it prints.
hypothesis.settings.register_profile("kvrag", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("kvrag"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "kvrag")


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that Python's, NumPy's and PyTorch's generators start every test with."""
    value = 20_261
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
