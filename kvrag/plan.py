"""From a prompt's text to the spans it is made of: what is read, and what is already in a cache.

    prompt text -> prefix | literal | cached | literal | cached | literal -> tokens, span by span

Each span is tokenised on its own. The encoding of a whole prompt is never sliced: a tokenizer merges
characters across a span's border, and the slice would then hold other tokens than the cache.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvrag.matching import ChunkMatcher
from kvrag.tiers import TIERS, Finder, Found, Place, Tier

Tokenize = Callable[[str], tuple[int, ...]]
_SHRINKS = 8


@dataclass(frozen=True, slots=True)
class Literal:
    """A piece of the prompt that has to be read.

    Attributes:
        start: place of its first character in the prompt.
        end: place behind its last character.
        text: `prompt[start:end]`.
        tokens: the encoding of `text` alone.
    """

    kind: ClassVar[str] = "read"
    start: int
    end: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning that all documents are encoded behind; same attributes as `Literal`."""

    kind: ClassVar[str] = "prefix"
    start: int
    end: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cached:
    """A piece of the prompt that is a known chunk.

    The span is where the chunk stands, not yet a promise: its entry is looked up by `tokens`, so an entry of
    another text or tokenizer is a miss, and the span is then read like a literal one.

    Attributes:
        start: place of its first character in the prompt.
        end: place behind its last character.
        text: `prompt[start:end]`: the chunk as it was given, or without its surrounding white space; in the
            tiers `partial` and `middle` a piece of it, in the tier `canonical` another form of it.
        tokens: the encoding of what the model sees, alone: of `text`, or of `seen`.
        key: the name under which the chunk is known.
        tier: how it was found.
        seen: the chunk's own text, where the model sees that instead of `text`; None: it sees `text`.
        whole: for a piece, the tokens of the whole chunk, by which its entry is looked up.
        row: for a piece, where `tokens` begin in `whole`.
    """

    kind: ClassVar[str] = "cached"
    start: int
    end: int
    text: str
    tokens: tuple[int, ...]
    key: str
    tier: Tier = "exact"
    seen: str | None = None
    whole: tuple[int, ...] | None = None
    row: int = 0

    @property
    def entry(self) -> tuple[int, ...]:
        """The tokens by which the rows are looked up."""
        return self.tokens if self.whole is None else self.whole


@dataclass(frozen=True, slots=True)
class Mark:
    """The mark of the known chunk behind it; the model does not see it. Attributes as those of `Literal`."""

    kind: ClassVar[str] = "mark"
    start: int
    end: int
    text: str
    tokens: tuple[int, ...] = ()


Span = Prefix | Literal | Cached | Mark


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """The spans of one prompt in order; joined, their texts are the prompt as it was given."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The prompt as it was given."""
        return "".join(span.text for span in self.spans)

    @property
    def seen(self) -> str:
        """The prompt as the model sees it: without marks, and with known chunks in their own form."""
        forms = (span.seen if isinstance(span, Cached) else None for span in self.spans)
        pairs = zip(self.spans, forms, strict=True)
        return "".join(
            "" if isinstance(span, Mark) else span.text if form is None else form for span, form in pairs
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt's tokens: those of every span, one span behind the other."""
        return tuple(token for span in self.spans for token in span.tokens)

    @property
    def num_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return sum(len(span.tokens) for span in self.spans)

    @property
    def prefix(self) -> Prefix | None:
        """The shared beginning, if the prompt has it."""
        first = self.spans[0] if self.spans else None
        return first if isinstance(first, Prefix) else None

    @property
    def cached(self) -> tuple[Cached, ...]:
        """The spans of known chunks, in order; a chunk that stands twice is there twice."""
        return tuple(span for span in self.spans if isinstance(span, Cached))

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of known chunks; the prefix is not among them."""
        return sum(len(span.tokens) for span in self.cached)

    @property
    def num_tokens_by_tier(self) -> dict[Tier, int]:
        """Tokens of known chunks by the way in which they were found; ways that found none are left out."""
        sums = {t: sum(len(span.tokens) for span in self.cached if span.tier == t) for t in TIERS}
        return {tier: num for tier, num in sums.items() if num}

    @property
    def num_read_tokens(self) -> int:
        """Tokens of the spans that have to be read in any case."""
        return sum(len(span.tokens) for span in self.spans if isinstance(span, Literal))


def plan(
    prompt: str,
    chunks: Finder | Mapping[str, str],
    *,
    prefix: str | None = None,
    tokenize: Tokenize,
    first: Tokenize | None = None,
    min_chars: int = 16,
    ends: Tokenize | None = None,
    min_tokens: int = 16,
) -> PromptPlan:
    """The spans of a prompt: the prefix, known chunks, and what lies between them.

    Chunks are found verbatim, as given or without their surrounding white space; from left to right, the
    longest one that begins at a place is taken, and nothing overlaps. The prefix goes before any chunk.
    A registry may find them in other forms as well, see `kvrag.known`.

    Args:
        prompt: the text as the model is to see it, after any chat template.
        chunks: key -> text, or a matcher or registry that already knows them.
        prefix: the text that documents are encoded behind; not at the prompt's beginning, it is not used.
        tokenize: text -> tokens, without any special tokens of its own making.
        first: the same for the first piece, where a tokenizer adds its beginning-of-text token.
            If the prompt begins with a known chunk, those tokens get an empty span of their own, so that the
            chunk's tokens are the same wherever it stands.
        min_chars: shorter chunks are read; unused if `chunks` is a matcher, which has its own.
        ends: text -> for each token of `tokenize(text)`, the place behind its last character; None: pieces of
            chunks are read.
        min_tokens: shorter pieces of chunks are read.

    >>> words = lambda text: tuple(len(word) for word in text.split())
    >>> p = plan("Note: the cat sat on the mat. Why?", {"a": "the cat sat on the mat."}, tokenize=words)
    >>> for span in p.spans:
    ...     print(span.kind, repr(span.text), span.tokens)
    read 'Note: ' (5,)
    cached 'the cat sat on the mat.' (3, 3, 3, 2, 3, 4)
    read ' Why?' (4,)
    """
    spans = _Spans(prompt, tokenize, first or tokenize)
    if prefix is not None and prompt.startswith(prefix):
        spans.append(Prefix, len(prefix))
    for found in _finder(chunks, min_chars).find(prompt, spans.end):
        spans.append_found(found, ends, min_tokens)
    spans.append(Literal, len(prompt))
    return PromptPlan(tuple(spans.done))


def _finder(chunks: Finder | Mapping[str, str], min_chars: int) -> Finder:
    if not isinstance(chunks, Mapping):
        return chunks
    matcher = ChunkMatcher(min_chars=min_chars)
    for key, text in chunks.items():
        matcher.add(key, text)
    return matcher


class _Spans:
    """Cuts a prompt from left to right; the first span is the one that `first` encodes."""

    def __init__(self, prompt: str, tokenize: Tokenize, first: Tokenize) -> None:
        self.done: list[Span] = []
        self.end = 0
        self.started = False
        self._prompt = prompt
        self._tokenize = tokenize
        self._first = first

    def append(self, make: Callable[[int, int, str, tuple[int, ...]], Span], end: int) -> None:
        """Cut from the last end up to `end`; what has neither text nor tokens is no span."""
        text = self._prompt[self.end : end]
        if not text and (self.started or make is not Prefix):
            return
        tokens = (self._tokenize if self.started else self._first)(text)
        if text or tokens:
            self.done.append(make(self.end, end, text, tokens))
            self.end, self.started = end, True

    def append_found(self, found: Place, ends: Tokenize | None, min_tokens: int) -> None:
        """Cut up to a known text and behind it; a piece without the tokens that it should have is read."""
        told = found if isinstance(found, Found) else Found(found.start, found.end, found.key)
        tier, text = told.tier, told.text
        if tier in ("partial", "middle") and text is not None:
            self._append_piece(told, text, ends, min_tokens)
            return
        if told.mark is not None:
            self.append(Literal, told.mark)
            self.done.append(Mark(self.end, told.start, self._prompt[self.end : told.start]))
            self.end = told.start
        self._append_cached(told.start, told.end, told.key, tier, text)

    def _append_piece(self, found: Found, text: str, ends: Tokenize | None, min_tokens: int) -> None:
        """The tokens of a known text that lie within a piece, if the piece alone has them as well."""
        whole, offset = self._tokenize(text), found.offset
        rows = _aligned(text, offset, offset + found.end - found.start, whole, self._tokenize, ends)
        if rows is None or rows.num < min_tokens:
            return
        start, end = (found.start + at - offset for at in (rows.start, rows.end))
        self._append_cached(start, end, found.key, found.tier, None, whole, rows.row)

    def _append_cached(
        self,
        start: int,
        end: int,
        key: str,
        tier: Tier,
        seen: str | None,
        whole: tuple[int, ...] | None = None,
        row: int = 0,
    ) -> None:
        self.append(Literal, start)
        if not self.started:
            self.append_special()
        text = self._prompt[start:end]
        tokens = self._tokenize(text if seen is None else seen)
        if tokens:
            self.done.append(Cached(start, end, text, tokens, key, tier, seen, whole, row))
            self.end = end

    def append_special(self) -> None:
        """Give what stands before every text a span of its own."""
        tokens = self._first("")
        if tokens:
            self.done.append(Literal(0, 0, "", tokens))
        self.started = True


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some of a text's tokens: the first one's number, how many, and the characters that they are."""

    row: int
    num: int
    start: int
    end: int


def _aligned(
    text: str, low: int, high: int, whole: tuple[int, ...], tokenize: Tokenize, ends: Tokenize | None
) -> _Rows | None:
    """The most tokens of `whole` within `text[low:high]` that their characters alone would give as well.

    Where a text is cut within a word, the tokens beside the cut may be others than in the whole; so the piece
    is made a token smaller there, a few times at most.
    """
    behind = () if ends is None else ends(text)
    if len(behind) != len(whole):  # this tokenizer cannot tell
        return None
    borders = (0, *behind)  # a token that ends where the next one does holds a part of a character only
    first, last = bisect_left(borders, low), bisect_right(borders, high) - 1
    for _ in range(_SHRINKS):
        first = bisect_right(borders, borders[min(first, len(whole))]) - 1
        if last <= first:
            break
        start, end = borders[first], borders[last]
        there, alone = whole[first:last], tokenize(text[start:end])
        if there == alone:
            return _Rows(first, last - first, start, end)
        if first == 0 or there[:1] == alone[:1]:
            last = bisect_left(borders, end) - 1
        else:
            first = bisect_right(borders, start)
    return None
