"""Texts that have caches or shall have them: what an engine looks for in prompts when no chunks are named."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from kvrag.canonical import canonical, views
from kvrag.errors import ConfigError, InputError, KVRagError
from kvrag.leftright import LeftRight
from kvrag.markers import marked
from kvrag.matching import ChunkMatcher
from kvrag.pieces import PieceIndex
from kvrag.tiers import TIERS, Found, Tier

logger = logging.getLogger(__name__)

# A text that is more times as long as what stands of it in the prompt is not worth its rows; and so no more
# text than this many times the prompt is looked at.
_MOST_TIMES = 32

Pieces = Sequence[str]
Resolver = Callable[[Sequence[str]], Mapping[str, Pieces]]
"""Keys -> for those that have one, the pieces of text that they are encoded behind."""

MAX_CHARS = 100_000_000


class KnownTexts:
    """A registry of texts by key; any thread may change it and look for its texts at any time.

    Whoever looks sees the registry as it was when he began, and neither waits for changes nor holds them up
    (changes wait for those who are looking, some milliseconds). A text that is not found is read like any
    other, so nothing depends on a text's being known but time.

    It holds `max_chars` characters of text at most. Beyond that, texts go that were neither added nor found
    for the longest time.

    Texts are found verbatim. What else counts has to be asked for, see docs/plan.md:

    * `canonical`: escaped for JSON, Python or HTML, wrapped, indented or quoted. The model then sees the
      known text instead of the prompt's form of it.
    * `partial`: a text's beginning; its rows are the first rows of the whole, exactly.
    * `middle`: any piece. Its rows saw the text before it, as if it had been encoded behind it.
    * `markers`: behind a mark `[[kv:KEY]]`, verbatim. The mark is left out of what the model sees.

    Args:
        tiers: what counts beside `exact`.
        prefix: the text that all of them are encoded behind; used where a call names none.
        max_chars: most characters of all texts together.
        min_chars: shorter texts are not looked for, unless marked.
        min_tokens: shorter pieces are read.

    Raises:
        ConfigError: an unknown tier, or a number below one.

    >>> known = KnownTexts()
    >>> known.add("a", "The cat sat on the mat.")
    >>> (found,) = known.find("So: The cat sat on the mat. Why?")
    >>> found.key, found.start, found.end
    ('a', 4, 27)
    """

    def __init__(
        self,
        tiers: Collection[Tier] = (),
        *,
        prefix: str = "",
        max_chars: int = MAX_CHARS,
        min_chars: int = 16,
        min_tokens: int = 16,
    ) -> None:
        unknown = {tiers} if isinstance(tiers, str) else set(tiers) - set(get_args(Tier))
        if unknown:
            raise ConfigError(
                f"no tier {min(unknown)!r}; expected a list of some of {', '.join(sorted(TIERS))}"
            )
        if min(max_chars, min_chars, min_tokens) < 1:
            raise ConfigError("max_chars, min_chars and min_tokens must be at least 1")
        self.tiers = tuple(tier for tier in TIERS if tier in {"exact", *tiers})
        self.prefix, self.max_chars = prefix, max_chars
        self.min_chars, self.min_tokens = min_chars, min_tokens
        self._sides = LeftRight(lambda: _Texts(self.tiers, min_chars))
        self._sizes: OrderedDict[str, int] = OrderedDict()  # longest unused first
        self._total = 0
        self._lock = threading.Lock()  # for the two above; held for moments
        self._writing = threading.Lock()

    def add(self, key: str, text: str, context: Pieces | Resolver = ()) -> None:
        """Make a text known; a key that is known already gets the new text.

        Args:
            key: its name.
            text: as it was, or will be, encoded.
            context: the pieces of text that it is encoded behind, beside the prefix, each tokenised on its
                own (see `RagPrompt.before`); or what tells them for a list of keys when they are needed.
        """
        self.update({key: text}, context)

    def update(self, texts: Mapping[str, str], context: Pieces | Resolver = ()) -> None:
        """The same for many texts at once, which is much faster than one by one."""
        if isinstance(context, str):
            raise InputError("context is one text; expected a list of texts")
        wanted = {k: t for k, t in texts.items() if len(t) <= self.max_chars}
        with self._writing:
            with self._lock:
                for key in texts:
                    self._total -= self._sizes.pop(key, 0)
                for key, text in wanted.items():
                    self._sizes[key] = len(text)
                    self._total += len(text)
                gone = [key for key in texts if key not in wanted]
                while self._total > self.max_chars:
                    key, size = self._sizes.popitem(last=False)
                    self._total -= size
                    gone.append(key)
            self._sides.change(lambda side: side.change(gone, wanted, context))

    def remove(self, *keys: str) -> None:
        """Forget keys; those that are not known are none of our business."""
        with self._writing:
            with self._lock:
                for key in keys:
                    self._total -= self._sizes.pop(key, 0)
            self._sides.change(lambda side: side.change(keys, {}, ()))

    def find(self, prompt: str, start: int = 0) -> list[Found]:
        """Known texts in `prompt[start:]`, in order, none overlapping another."""
        with self._sides.reading() as side:
            found = side.find(prompt, start)
        with self._lock:
            for one in found:
                if one.key in self._sizes:
                    self._sizes.move_to_end(one.key)
        return found

    def contexts(self, keys: Iterable[str]) -> dict[str, Pieces]:
        """The pieces of text that these are encoded behind; keys without any are left out.

        If they cannot be told, because a collection cannot be read, say, that is logged, and the texts count
        as encoded behind nothing: they are read then.
        """
        asked: dict[Resolver, list[str]] = {}
        found: dict[str, Pieces] = {}
        with self._sides.reading() as side:
            noted = {key: side.contexts[key] for key in dict.fromkeys(keys) if key in side.contexts}
        for key, context in noted.items():
            if callable(context):
                asked.setdefault(context, []).append(key)
            else:
                found[key] = context
        for resolver, some in asked.items():
            try:
                found |= {k: pieces for k, pieces in resolver(some).items() if pieces}
            except KVRagError as error:
                logger.warning("what %d texts are encoded behind cannot be told: %s", len(some), error)
        return found

    def text(self, key: str) -> str:
        """The text of a key.

        Raises:
            KeyError: it is not known.
        """
        with self._sides.reading() as side:
            return side.exact.text(key)

    @property
    def num_chars(self) -> int:
        """Characters of all texts together."""
        with self._lock:
            return self._total

    def __len__(self) -> int:
        """How many keys are known."""
        with self._lock:
            return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        """Whether a key is known."""
        with self._lock:
            return key in self._sizes

    def __iter__(self) -> Iterator[str]:
        """The keys that are known now."""
        with self._sides.reading() as side:
            return iter(list(side.exact))


class _Texts:
    """One copy of what is known, searched in several ways."""

    def __init__(self, tiers: Collection[Tier], min_chars: int) -> None:
        self.exact = ChunkMatcher(min_chars=min_chars)
        self.contexts: dict[str, Pieces | Resolver] = {}
        self._by_mark = "markers" in tiers
        self._canonical = ChunkMatcher(min_chars=min_chars) if "canonical" in tiers else None
        middles = "middle" in tiers
        self._pieces = PieceIndex(middles=middles) if middles or "partial" in tiers else None

    def change(self, gone: Iterable[str], new: Mapping[str, str], context: Pieces | Resolver) -> None:
        """Remove keys, then add or replace others."""
        for key in gone:
            self._remove(key)
        for key, text in new.items():
            if key in self.exact and self.exact.text(key) != text:
                self._remove(key)
            if key not in self.exact:
                self._add(key, text)
            self.contexts.pop(key, None)
            if context:
                self.contexts[key] = context

    def find(self, prompt: str, start: int) -> list[Found]:
        """Tier by tier, each in the gaps that the ones before have left."""
        found: list[Found] = []
        if self._by_mark:
            marks = marked(prompt, start, self._text)
            found = [Found(begin, end, key, "markers", mark=mark) for mark, begin, end, key in marks]
        for way in (self._exact_in, self._canonical_in, self._pieces_in):
            more = [one for low, high in _gaps(found, start, len(prompt)) for one in way(prompt, low, high)]
            found = sorted([*found, *more], key=lambda one: one.start)
        return found

    def _add(self, key: str, text: str) -> None:
        self.exact.add(key, text)
        if self._canonical is not None:
            self._canonical.add(key, canonical(text))
        if self._pieces is not None:
            self._pieces.add(key, text)

    def _remove(self, key: str) -> None:
        if key in self.exact:
            self.exact.remove(key)
            self.contexts.pop(key, None)
            if self._canonical is not None:
                self._canonical.remove(key)
            if self._pieces is not None:
                self._pieces.remove(key)

    def _text(self, key: str) -> str | None:
        return self.exact.text(key) if key in self.exact else None

    def _exact_in(self, prompt: str, low: int, high: int) -> list[Found]:
        return [Found(low + m.start, low + m.end, m.key) for m in self.exact.find(prompt[low:high])]

    def _canonical_in(self, prompt: str, low: int, high: int) -> list[Found]:
        """The first view goes first; the others look at what is left of the gap."""
        if self._canonical is None:
            return []
        found: list[Found] = []
        for view in views(prompt[low:high]):
            for match in self._canonical.find(view.text):
                start, end = view.place(match.start, match.end)
                text = self.exact.text(match.key)
                if len(text) <= _MOST_TIMES * (end - start):
                    found.append(Found(low + start, low + end, match.key, "canonical", text))
        return _apart(found)

    def _pieces_in(self, prompt: str, low: int, high: int) -> list[Found]:
        if self._pieces is None:
            return []
        found = []
        for piece in self._pieces.find(prompt, low, high):
            text = self.exact.text(piece.key)
            if len(text) <= _MOST_TIMES * (piece.end - piece.start):
                tier: Tier = "middle" if piece.offset else "partial"
                found.append(Found(piece.start, piece.end, piece.key, tier, text, piece.offset))
        return found


def _gaps(found: Sequence[Found], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What is left between places that are taken, marks included."""
    for one in found:
        low = one.start if one.mark is None else one.mark
        if start < low:
            yield start, low
        start = one.end
    if start < end:
        yield start, end


def _apart(found: Iterable[Found]) -> list[Found]:
    """Leftmost, then longest, then first; without those that overlap one of these."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: (f.start, -f.end)):
        if not kept or one.start >= kept[-1].end:
            kept.append(one)
    return kept
