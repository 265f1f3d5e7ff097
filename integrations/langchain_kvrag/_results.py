"""From the engine's answer to what LangChain reports: token counts, caches, documents, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from kvrag import Answer, TokenLogprob


def usage_of(answer: Answer) -> UsageMetadata:
    """Token counts in LangChain's form; `cache_read` are prompt tokens that came from caches."""
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.new_tokens,
        total_tokens=usage.prompt_tokens + usage.new_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def logprobs_of(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    """Log probabilities in OpenAI's form, under "logprobs"; empty without any."""
    if not tokens:
        return {}
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"logprobs": {"content": content}}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.text.encode()), "logprob": token.logprob}


def report(answer: Answer) -> dict[str, Any]:
    """What came from caches, what each document got, how long it took; plain values that can be stored."""
    return {
        "usage": asdict(answer.usage),
        "documents": [
            {
                "key": use.key,
                "num_tokens": use.num_tokens,
                "is_hit": use.is_hit,
                "mass": use.mass,
                "focus": use.focus,
                "question_mass": use.question_mass,
                "dropped_at": use.dropped_at,
            }
            for use in answer.documents
        ],
        "seconds": asdict(answer.timing),
        "policy": answer.policy,
        "in_full": answer.in_full,
    }
