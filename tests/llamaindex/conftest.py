"""Engines, models and collections that the tests of the LlamaIndex components share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent

from kvrag import Engine, Model
from llama_index.embeddings.kvrag import LexicalEmbedding
from llama_index.llms.kvrag import KVCacheLLM

TEXTS = [
    "Neiia Kleiski. She lives in Naihaven. Her hobby is judo.",
    "Peor Tools. The company sells boats. It was founded in 1931.",
    "The lighthouse of Varn was built in 1871 and painted red.",
    "A ferry crosses the Mirrow twice a day, but not on Sundays.",
    "The bakery of Old Harn sells bread with caraway and salt.",
]


@pytest.fixture(scope="session")
def reader() -> Model:
    """The small model that comes along."""
    return Model.load()


@pytest.fixture
def engine(tmp_path: Path, reader: Model) -> Iterator[Engine]:
    """It, with an empty store on disk."""
    with Engine(reader, tmp_path / "store") as made:
        yield made


@pytest.fixture
def make(engine: Engine) -> Callable[..., KVCacheLLM]:
    """Models that share the engine."""

    def made(**fields: Any) -> KVCacheLLM:
        return KVCacheLLM(**{"engine": engine, "max_tokens": 12, **fields})

    return made


@pytest.fixture
def llm(make: Callable[..., KVCacheLLM]) -> KVCacheLLM:
    """One model."""
    return make()


@pytest.fixture(autouse=True)
def settings(reader: Model) -> Iterator[None]:
    """LlamaIndex counts with our tokenizer and embeds without a download."""
    Settings.embed_model = LexicalEmbedding()
    Settings.tokenizer = lambda text: list(reader.text.tokenize(text))
    yield
    Settings._embed_model = Settings._llm = Settings._tokenizer = None


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """LlamaIndex asks for the thread's event loop, which Python would make and nobody close."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    asyncio.set_event_loop(None)
    made.close()


class Heard(BaseEventHandler):
    """Keeps the events of some models."""

    events: list[Any] = []  # noqa: RUF012 - a field of pydantic's

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.events.append(event)

    def answers(self) -> list[Any]:
        """What models have answered, in order."""
        ends = (LLMChatEndEvent, LLMCompletionEndEvent)
        return [event.response for event in self.events if isinstance(event, ends)]


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Events of this test."""
    handler, root = Heard(), get_dispatcher()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)
