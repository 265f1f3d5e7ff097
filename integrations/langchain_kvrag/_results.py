"""From the engine's answer to what LangChain reports: token counts, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
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
