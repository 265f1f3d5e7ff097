"""A prompt plan in words: which spans are cached, how much is read, and why a chunk was not found."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping

from kvrag.matching import ChunkMatcher
from kvrag.plan import Cached, Prefix, PromptPlan


def explain(
    plan: PromptPlan, chunks: ChunkMatcher | Mapping[str, str] | None = None, *, width: int = 48
) -> str:
    """A table of the plan's spans, a sum, and a reason for each of `chunks` that is not in it.

    Args:
        plan: what `kvrag.plan.plan` returned.
        chunks: the chunks that were expected in the prompt; None leaves out the reasons.
        width: characters of each text that are shown.
    """
    lines = ["kind       characters  tokens  text"]
    for span in plan.spans:
        place = f"{span.start}..{span.end}"
        name = f"[{span.key}] " if isinstance(span, Cached) else ""
        lines.append(f"{span.kind:<8} {place:>12} {len(span.tokens):>7}  {name}{_shown(span.text, width)}")
    cached = plan.num_cached_tokens + (len(plan.prefix.tokens) if plan.prefix else 0)
    lines.append(
        f"{plan.num_tokens} tokens: {cached} in {len(plan.cached)} known chunks and the prefix, "
        f"{plan.num_read_tokens} to read"
    )
    if chunks is not None:
        found = {span.key for span in plan.cached}
        least = chunks.min_chars if isinstance(chunks, ChunkMatcher) else 0
        for key in chunks:
            if key not in found:
                text = chunks.text(key) if isinstance(chunks, ChunkMatcher) else chunks[key]
                lines.append(f"[{key}] not used: {why_not(plan, text, min_chars=least)}")
    return "\n".join(lines)


def why_not(plan: PromptPlan, text: str, *, min_chars: int = 0) -> str:
    """The most likely reason why a chunk is not among a plan's cached spans, in one line.

    Args:
        plan: the plan of the prompt that the chunk was expected in.
        text: the chunk.
        min_chars: length from which on chunks were looked for.
    """
    prompt, core = plan.text, text.strip()
    if not core:
        return "it is empty"
    if len(core) < min_chars:
        return f"it has {len(core)} characters, and chunks shorter than {min_chars} are read"
    if (start := prompt.find(core)) >= 0:
        return _taken(plan, start, start + len(core))
    if change := _changed(prompt, core):
        return f"the prompt holds it {change}; only the verbatim text is matched"
    return _differs(prompt, core)


def _taken(plan: PromptPlan, start: int, end: int) -> str:
    """Who has the characters of a chunk that does stand in the prompt."""
    for span in plan.spans:
        if span.start < end and start < span.end:
            if isinstance(span, Cached):
                return f"[{span.key}], which begins earlier or is longer, has its place {start}..{end}"
            if isinstance(span, Prefix):
                return f"the prefix has its place {start}..{end}"
    return f"it stands at {start}..{end}, but was not known when the plan was made"


def _changed(prompt: str, text: str) -> str | None:
    """What was done to a text before it was pasted, if it is one of the usual things."""
    forms = {
        "HTML-escaped": html.escape(text),
        "JSON-escaped": json.dumps(text)[1:-1],
        "JSON-escaped with its characters as they are": json.dumps(text, ensure_ascii=False)[1:-1],
        "as a Python literal": repr(text)[1:-1],
        "quoted with '> '": text.replace("\n", "\n> "),
    }
    for change, form in forms.items():
        if form in prompt:
            return change
    if "".join(text.split()) in "".join(prompt.split()):
        return "with other white space"
    if text.casefold() in prompt.casefold():
        return "in another letter case"
    return None


def _differs(prompt: str, text: str) -> str:
    """How far the prompt follows a text that it does not hold."""
    low, high = 0, len(text)  # the longest beginning of the text that the prompt holds, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] in prompt else (low, middle - 1)
    if low < min(16, len(text)):
        return "it is not in the prompt"
    end = prompt.find(text[:low]) + low
    return (
        f"the prompt follows it for {low} of {len(text)} characters; "
        f"then it has {_shown(prompt[end:], 12)} instead of {_shown(text[low:], 12)}"
    )


def _shown(text: str, width: int) -> str:
    """A text in quotes on one line, its middle left out if it is long."""
    if len(text) > width:
        half = (width - 1) // 2
        text = f"{text[:half]}…{text[len(text) - half :]}"
    return repr(text)
