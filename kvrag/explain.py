"""A prompt plan in words: which spans are cached, how much is read, and why a chunk was not found."""

from __future__ import annotations

import html
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from kvrag.known import KnownTexts
from kvrag.matching import ChunkMatcher
from kvrag.plan import Cached, Prefix, PromptPlan
from kvrag.store.key import tagged_digest

logger = logging.getLogger(__name__)

_MAX_TOLD = 10_000
_LEAST = 8  # characters of a text; with fewer it could not be told from others


def explain(
    plan: PromptPlan,
    chunks: KnownTexts | ChunkMatcher | Mapping[str, str] | None = None,
    *,
    width: int = 48,
    fits: int | None = None,
) -> str:
    """A table of the plan's spans, a sum, and a reason for each of `chunks` that is not in it.

    Args:
        plan: what `kvrag.plan.plan` returned.
        chunks: the chunks that were expected in the prompt; None leaves out the reasons.
        width: characters of each text that are shown.
        fits: longest line of the table, where fewer characters are shown for it; None: no limit.
    """
    lines = ["kind       characters  tokens  text"]
    for span in plan.spans:
        place = f"{span.start}..{span.end}"
        name = _name(span) if isinstance(span, Cached) else ""
        start = f"{span.kind:<8} {place:>12} {len(span.tokens):>7}  {name}"
        lines.append(start + _fitting(span.text, width, None if fits is None else fits - len(start)))
    cached = plan.num_cached_tokens + (len(plan.prefix.tokens) if plan.prefix else 0)
    lines.append(
        f"{plan.num_tokens} tokens: {cached} in {len(plan.cached)} known chunks and the prefix, "
        f"{plan.num_read_tokens} to read"
    )
    if chunks is not None:
        found = {span.key for span in plan.cached}
        least = 0 if isinstance(chunks, Mapping) else chunks.min_chars
        for key in chunks:
            if key not in found:
                text = chunks[key] if isinstance(chunks, Mapping) else chunks.text(key)
                lines.append(f"[{key}] not used: {why_not(plan, text, min_chars=least)}")
    return "\n".join(lines)


class Missing:
    """Says, once for each text, why a text that a retriever has returned came from no cache; at DEBUG level.

    May be used from any thread.
    """

    def __init__(self) -> None:
        """Nothing was told yet."""
        self._told: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def log(self, plan: PromptPlan, texts: Iterable[str], *, min_chars: int = 16) -> None:
        """Log a line for each of these texts that no cached span of the plan is, or is a piece of.

        Args:
            plan: of the prompt that they were expected in.
            texts: as the retriever returned them.
            min_chars: length from which on texts were looked for.
        """
        if not logger.isEnabledFor(logging.DEBUG):
            return
        used = {_told_as(span.text if span.seen is None else span.seen) for span in plan.cached}
        pieces = [span.text for span in plan.cached if span.whole is not None]
        for text in texts:
            name = _told_as(text)
            if name in used or any(piece in text for piece in pieces) or not self._is_new(name):
                continue
            why = why_not(plan, text, min_chars=min_chars)
            logger.debug("%s came from no cache: %s", _shown(text, 48), why)

    def _is_new(self, name: str) -> bool:
        """Whether nothing was told of it yet; of very many, the oldest are forgotten."""
        with self._lock:
            is_new = name not in self._told
            self._told[name] = None
            if len(self._told) > _MAX_TOLD:
                self._told.popitem(last=False)
        return is_new


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


def _told_as(text: str) -> str:
    return tagged_digest({"text": text.strip().encode("utf-8", "surrogatepass")})


def _name(span: Cached) -> str:
    """Key of a span, and how it was found if not verbatim."""
    if span.tier == "exact":
        return f"[{span.key}] "
    rows = f" {span.row}..{span.row + len(span.tokens)} of {len(span.whole)}" if span.whole else ""
    return f"[{span.key}: {span.tier}{rows}] "


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


def _fitting(text: str, width: int, room: int | None) -> str:
    """The same in less room, quotes and escapes counted."""
    shown = _shown(text, width)
    while room is not None and len(shown) > room and width > _LEAST:
        width -= 1
        shown = _shown(text, width)
    return shown


def _shown(text: str, width: int) -> str:
    """A text in quotes on one line, its middle left out if it is long."""
    if len(text) > width:
        half = (width - 1) // 2
        text = f"{text[:half]}…{text[len(text) - half :]}"
    return repr(text)
