"""kvrag between LlamaIndex's retrievers and synthesizers: nodes on their way into a prompt."""

from __future__ import annotations

from llama_index.postprocessor.kvrag.base import KVCachePostprocessor, answer_scores

__all__ = ["KVCachePostprocessor", "answer_scores"]
