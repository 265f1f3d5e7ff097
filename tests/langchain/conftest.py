"""Engines and chains that the tests of the LangChain adapters share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["LANGSMITH_TRACING"] = "false"

import pytest

from kvrag import Engine
from kvrag.testing.models import tiny


@pytest.fixture(scope="session")
def bare_engine() -> Iterator[Engine]:
    """A random model without a store."""
    with Engine(tiny()) as engine:
        yield engine


@pytest.fixture
def engine(tmp_path: Path, bare_engine: Engine) -> Iterator[Engine]:
    """The same model with an empty store on disk."""
    with Engine(bare_engine.model, tmp_path / "store") as made:
        yield made


@pytest.fixture
def documents() -> list[str]:
    """Texts long enough to be looked for."""
    return [
        "The lighthouse of Varn was built in 1871 and painted red.",
        "A ferry crosses the Mirrow twice a day, but not on Sundays.",
        "The bakery of Old Harn sells bread with caraway and salt.",
        "Every spring the river takes a piece of the northern pier.",
    ]


@pytest.fixture
def cached() -> Any:
    """How many of a message's prompt tokens came from caches."""

    def count(message: Any) -> int:
        return int(message.usage_metadata["input_token_details"]["cache_read"])

    return count
