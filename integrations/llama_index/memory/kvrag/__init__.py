"""kvrag in LlamaIndex's memory: what a long conversation drops is kept with its caches, and found again."""

from __future__ import annotations

from llama_index.memory.kvrag.base import KVCacheMemoryBlock

__all__ = ["KVCacheMemoryBlock"]
