"""kvrag in LlamaIndex's ingestion pipelines: caches are built as nodes are ingested."""

from __future__ import annotations

from llama_index.ingestion.kvrag.base import KVCacheTransform

__all__ = ["KVCacheTransform"]
