"""From a prompt's text to the spans it is made of: what is read, and what is already in a cache.

    prompt text -> prefix | literal | cached | literal | cached | literal -> tokens, span by span

Each span is tokenised on its own. The encoding of a whole prompt is never sliced: a tokenizer merges
characters across a span's border, and the slice would then hold other tokens than the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from kvrag.matching import ChunkMatcher

Tokenize = Callable[[str], tuple[int, ...]]


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
        text: `prompt[start:end]`: the chunk as it was given, or without its surrounding white space.
        tokens: the encoding of `text` alone.
        key: the name under which the chunk is known.
    """

    kind: ClassVar[str] = "cached"
    start: int
    end: int
    text: str
    tokens: tuple[int, ...]
    key: str


Span = Prefix | Literal | Cached


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """The spans of one prompt in order; joined, their texts are the prompt."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The prompt."""
        return "".join(span.text for span in self.spans)

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
    def num_read_tokens(self) -> int:
        """Tokens of the spans that have to be read in any case."""
        return sum(len(span.tokens) for span in self.spans if isinstance(span, Literal))


def plan(
    prompt: str,
    chunks: ChunkMatcher | Mapping[str, str],
    *,
    prefix: str | None = None,
    tokenize: Tokenize,
    first: Tokenize | None = None,
    min_chars: int = 16,
) -> PromptPlan:
    """The spans of a prompt: the prefix, known chunks, and what lies between them.

    Chunks are found verbatim, as given or without their surrounding white space; from left to right, the
    longest one that begins at a place is taken, and nothing overlaps. The prefix goes before any chunk.

    Args:
        prompt: the text as the model is to see it, after any chat template.
        chunks: key -> text, or a matcher that already knows them.
        prefix: the text that documents are encoded behind; not at the prompt's beginning, it is not used.
        tokenize: text -> tokens, without any special tokens of its own making.
        first: the same for the first piece, where a tokenizer adds its beginning-of-text token.
            If the prompt begins with a known chunk, those tokens get an empty span of their own, so that the
            chunk's tokens are the same wherever it stands.
        min_chars: shorter chunks are read; unused if `chunks` is a matcher, which has its own.

    >>> words = lambda text: tuple(len(word) for word in text.split())
    >>> p = plan("Note: the cat sat on the mat. Why?", {"a": "the cat sat on the mat."}, tokenize=words)
    >>> for span in p.spans:
    ...     print(span.kind, repr(span.text), span.tokens)
    read 'Note: ' (5,)
    cached 'the cat sat on the mat.' (3, 3, 3, 2, 3, 4)
    read ' Why?' (4,)
    """
    if not isinstance(chunks, ChunkMatcher):
        matcher = ChunkMatcher(min_chars=min_chars)
        for key, text in chunks.items():
            matcher.add(key, text)
        chunks = matcher

    spans = _Spans(prompt, tokenize, first or tokenize)
    if prefix is not None and prompt.startswith(prefix):
        spans.append(Prefix, len(prefix))
    for match in chunks.find(prompt, spans.end):
        spans.append(Literal, match.start)
        if not spans.started:
            spans.append_special()
        spans.append(partial(Cached, key=match.key), match.end)
    spans.append(Literal, len(prompt))
    return PromptPlan(tuple(spans.done))


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

    def append_special(self) -> None:
        """Give what stands before every text a span of its own."""
        tokens = self._first("")
        if tokens:
            self.done.append(Literal(0, 0, "", tokens))
        self.started = True
