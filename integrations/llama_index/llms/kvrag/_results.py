"""From the engine's answer to what LlamaIndex reports: token counts, caches, documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import LogProb

from kvrag import Answer, TokenLogprob
from kvrag.answer import report


def counts_of(answer: Answer) -> dict[str, int]:
    """Token counts under the names that LlamaIndex's handlers look for."""
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
        "cached_tokens": usage.cached_tokens,
    }


def raw_of(answer: Answer, model: str, session: str | None = None) -> dict[str, Any]:
    """Plain values that can be stored: counts, documents, seconds, a session's memory and name."""
    counts = counts_of(answer)
    cached = counts.pop("cached_tokens")
    return {
        "model": model,
        "finish_reason": answer.finish_reason,
        "usage": {**counts, "prompt_tokens_details": {"cached_tokens": cached}},
        "kvrag": {**report(answer), **({"session": session} if answer.memory else {})},
    }


def logprobs_of(tokens: Sequence[TokenLogprob] | None) -> list[list[LogProb]] | None:
    """For each token it and then the likeliest ones at its place; None without any."""
    if not tokens:
        return None
    return [[_logprob(token), *map(_logprob, token.top)] for token in tokens]


def _logprob(token: TokenLogprob) -> LogProb:
    return LogProb(token=token.text, logprob=token.logprob, bytes=list(token.text.encode()))
