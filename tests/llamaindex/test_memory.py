"""What a conversation drops from its short-term memory is kept, found again, and comes from caches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory

import llama_index.memory.kvrag
from kvrag import ConfigError, Engine
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.memory.kvrag import KVCacheMemoryBlock

FACTS = [
    "My sister Tova paints lighthouses in Varn.",
    "The ferry to Mirrow was late again on Tuesday.",
    "I bought caraway bread at the bakery of Old Harn.",
    "Our boat has a green hull and a broken mast.",
]
Block = Callable[..., KVCacheMemoryBlock]


@pytest.fixture
def block(llm: KVCacheLLM, tmp_path: Path) -> Any:
    made: list[KVCacheMemoryBlock] = []

    def make(**fields: Any) -> KVCacheMemoryBlock:
        made.append(KVCacheMemoryBlock(llm=llm, path=tmp_path / "memory", **fields))
        return made[-1]

    yield make
    for one in made:
        one.close()


def said(text: str, session: str = "s") -> list[ChatMessage]:
    return [
        ChatMessage(role="user", content=text, additional_kwargs={"session_id": session}),
        ChatMessage(role="assistant", content="I see.", additional_kwargs={"session_id": session}),
    ]


def find(block: KVCacheMemoryBlock, text: str, session: str = "s") -> str:
    return asyncio.run(block.aget([ChatMessage(role="user", content=text)], session_id=session))


def test_public_names() -> None:
    assert llama_index.memory.kvrag.__all__ == ["KVCacheMemoryBlock"]


def test_flushed_messages_come_back_from_caches(block: Block, llm: KVCacheLLM, engine: Engine) -> None:
    kept = block(max_tokens=90, k=2)

    async def main() -> list[ChatMessage]:
        memory = Memory.from_defaults(
            session_id="s",
            token_limit=120,
            chat_history_token_ratio=0.4,
            token_flush_size=30,
            tokenizer_fn=llm.tokenize,
            memory_blocks=[kept],
        )
        for fact in FACTS:
            await memory.aput_messages(said(fact))
        await memory.aput(ChatMessage(role="user", content="Who paints lighthouses?"))
        whole = await memory.aget()
        await memory.sql_store._async_engine.dispose()
        return whole

    whole = asyncio.run(main())
    assert not any("Tova" in (m.content or "") for m in whole[1:]), "it was flushed"
    assert whole[0].role == "system"
    assert "My sister Tova paints lighthouses in Varn." in whole[0].content
    assert engine.store.stats().entries > 0
    documents = llm.chat(whole).raw["kvrag"]["documents"]
    assert documents
    assert all(document["is_hit"] for document in documents)


def test_what_is_nearest_comes_back_in_order_and_fits(block: Block) -> None:
    kept = block(max_tokens=90)
    for fact in FACTS:
        asyncio.run(kept.aput(said(fact)))
    found = find(kept, "Did the ferry to Mirrow sail, with the lighthouses in Varn in sight?")
    assert found.index("Tova") < found.index("Mirrow"), "as it was said"
    assert len(kept.llm.tokenize(found)) <= 90 + 2
    assert len(found.split("\n\n")) < len(FACTS)
    assert find(kept, "ferry", "another session") == ""
    assert asyncio.run(kept.aget([])) == ""


def test_it_outlives_the_process(block: Block) -> None:
    first = block()
    asyncio.run(first.aput(said(FACTS[0])))
    first.close()
    second = block()
    assert "Tova" in find(second, "Who is Tova?")
    asyncio.run(second.aput(said(FACTS[1])))
    assert "Tova" in find(second, "Tova and the ferry")
    assert "Mirrow" in find(second, "Tova and the ferry")


def test_what_is_too_long_is_not_kept(block: Block) -> None:
    kept = block(max_tokens=20)
    asyncio.run(kept.aput(said("word " * 100)))
    asyncio.run(kept.aput(said("")))
    assert "word" not in find(kept, "word")


def test_truncating_drops_the_oldest(block: Block) -> None:
    kept = block()
    content = "user: one thing\n\nuser: another thing\n\nuser: a third thing"
    assert asyncio.run(kept.atruncate(content, 1)) == "user: another thing\n\nuser: a third thing"
    assert asyncio.run(kept.atruncate(content, 1000)) is None


def test_settings_that_cannot_work(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(ConfigError, match="expected the KVCacheLLM"):
        KVCacheMemoryBlock(llm="llm", path=tmp_path)  # type: ignore[arg-type]
    with Engine(reader) as engine, pytest.raises(ConfigError, match="no store"):
        KVCacheMemoryBlock(llm=KVCacheLLM(engine=engine), path=tmp_path)
