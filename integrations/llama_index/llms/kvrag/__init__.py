"""kvrag for LlamaIndex: query and chat engines that read their documents from prebuilt KV caches."""

from __future__ import annotations

from llama_index.llms.kvrag.base import KVCacheLLM

__all__ = ["KVCacheLLM"]
