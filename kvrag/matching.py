"""Known chunk texts, found again inside a prompt: verbatim, leftmost, longest, in linear time.

The first `min_chars` characters of a chunk are its anchor. Where an anchor occurs in the prompt, the longest
chunk that begins there is found by a binary search over lengths: each chunk leaves a *marker* (length, hash
of that many leading characters) at every step that the search takes on its way to the chunk's own length.
Thousands of chunks that share an anchor, or a prompt of one repeated character, therefore cost a handful of
dictionary look-ups per character, whatever is known.

Source: Waldvogel et al. 1997, "Scalable High Speed IP Routing Lookups" (binary search on prefix lengths);
Karp and Rabin 1987 (rolling hash). Departure: what a marker's best shorter match is, is found when first
asked for, and markers are laid when a prompt first holds their anchor, so that adding and removing is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

from kvrag.errors import ConfigError

# A prime without structure: for 2**61 - 1 the powers of the base repeat after 61 characters.
_MODULUS = 1_187_910_396_338_271_247
_CHAR_BITS = 32


@dataclass(frozen=True, slots=True)
class Match:
    """Where a known chunk stands: `prompt[start:end]` is its text, as given or stripped."""

    start: int
    end: int
    key: str


@dataclass(slots=True)
class _Marker:
    """A prefix that at least one chunk passes through; `text` is set if it is a whole chunk."""

    length: int
    uses: int = 0
    text: str | None = None
    best: str | None = None  # the longest shorter chunk that is a prefix of this one, as of `version`
    version: int = -1


class ChunkMatcher:
    """A dictionary of chunk texts that can be found in prompts.

    A chunk is found as it was given and without its surrounding white space. `find` may run in any number of
    threads while nothing changes; changes need a lock of the caller's.

    Args:
        min_chars: shorter texts are not looked for; reading them costs less than keeping track of them,
            and very short ones would be found by accident.

    >>> matcher = ChunkMatcher(min_chars=3)
    >>> matcher.add("a", "the cat")
    >>> matcher.add("b", "the cat sat")
    >>> matcher.find("Is the cat sat there?")
    [Match(start=3, end=14, key='b')]
    """

    def __init__(self, *, min_chars: int = 16) -> None:
        if min_chars < 1:
            raise ConfigError(f"min_chars is {min_chars}; it must be at least 1")
        self.min_chars = min_chars
        self._texts: dict[str, str] = {}  # key -> text as given
        self._keys: dict[str, dict[str, None]] = {}  # form -> keys that have it, in order of arrival
        self._anchors: dict[str, _Marker] = {}
        self._markers: dict[tuple[int, int], _Marker] = {}  # (length, hash) -> marker
        self._waiting: dict[str, dict[str, None]] = {}  # anchor -> forms whose markers are not laid yet
        self._laying = Lock()
        self._shift = pow(2, _CHAR_BITS * min_chars, _MODULUS)
        self._shifts: list[int] = []  # hash factor of 2**bit characters, one per bit of the longest chunk
        self._version = 0

    def __len__(self) -> int:
        """How many keys are known."""
        return len(self._texts)

    def __contains__(self, key: str) -> bool:
        """Whether a key is known."""
        return key in self._texts

    def __iter__(self) -> Iterator[str]:
        """Known keys, oldest first."""
        return iter(self._texts)

    def text(self, key: str) -> str:
        """The text that was added under a key.

        Raises:
            KeyError: the key is not known.
        """
        return self._texts[key]

    def add(self, key: str, text: str) -> None:
        """Make a text known; a key that is known already gets the new text.

        Blank and too short texts are remembered but never found.
        """
        if key in self._texts:
            if self._texts[key] == text:
                return
            self.remove(key)
        self._texts[key] = text
        for form in _forms(text):
            keys = self._keys.setdefault(form, {})
            if not keys and len(form) >= self.min_chars:
                self._announce(form)
            keys[key] = None

    def remove(self, key: str) -> None:
        """Forget a key; one that is not known is none of our business."""
        text = self._texts.pop(key, None)
        if text is None:
            return
        for form in _forms(text):
            keys = self._keys[form]
            del keys[key]
            if not keys:
                del self._keys[form]
                if len(form) >= self.min_chars:
                    self._withdraw(form)

    def find(self, prompt: str, start: int = 0) -> list[Match]:
        """Chunks that stand in `prompt[start:]`, in order, none overlapping another.

        From left to right, the longest chunk that begins at a place is taken and the search goes on behind
        it. Of several keys with one text, the oldest is named.
        """
        matches: list[Match] = []
        prefix_hashes: list[int] = []
        anchors, width = self._anchors, self.min_chars
        last = len(prompt) - width
        while start <= last:
            name = prompt[start : start + width]
            anchor = anchors.get(name)
            if anchor is not None:
                if name in self._waiting:
                    self._lay(name)
                prefix_hashes = prefix_hashes or _prefix_hashes(prompt)
                text = self._longest(prefix_hashes, start, anchor)
                if text is not None and prompt.startswith(text, start):  # a hash may lie, once in 2**60
                    matches.append(Match(start, start + len(text), next(iter(self._keys[text]))))
                    start += len(text)
                    continue
            start += 1
        return matches

    def _longest(self, hashes: list[int], start: int, anchor: _Marker) -> str | None:
        """The longest chunk whose hash stands at `start`."""
        marker = self._deepest(hashes, start, anchor, limit=len(hashes) - start)
        unknown = []
        while marker.text is None and marker.version != self._version:
            if marker is anchor:
                break
            unknown.append(marker)
            marker = self._deepest(hashes, start, anchor, limit=marker.length)
        # A whole chunk is its own answer; another marker remembers it; an anchor without either has none.
        best = marker.text
        if best is None and marker.version == self._version:
            best = marker.best
        for passed in unknown:
            passed.best, passed.version = best, self._version
        return best

    def _deepest(self, hashes: list[int], start: int, anchor: _Marker, *, limit: int) -> _Marker:
        """The last marker shorter than `limit` that a binary search over lengths meets at `start`.

        Every chunk shorter than `limit` that stands here is that marker or a prefix of it: the search leaves
        the way to a chunk only over a marker that is longer.
        """
        found, length = anchor, self.min_chars
        value = (hashes[start + length] - hashes[start] * self._shift) % _MODULUS
        for bit in range(len(self._shifts) - 1, -1, -1):
            longer = length + (1 << bit)
            if longer >= limit:
                continue
            here = ((value - hashes[start + length]) * self._shifts[bit] + hashes[start + longer]) % _MODULUS
            marker = self._markers.get((longer, here))
            if marker is not None:
                found, length, value = marker, longer, here
        return found

    def _announce(self, form: str) -> None:
        """Put a chunk down under its anchor."""
        name = form[: self.min_chars]
        self._anchors.setdefault(name, _Marker(self.min_chars)).uses += 1
        self._waiting.setdefault(name, {})[form] = None

    def _lay(self, name: str) -> None:
        """Lay the markers on the way to every chunk that waits under an anchor."""
        with self._laying:
            for form in self._waiting.get(name, ()):
                while (len(form) - self.min_chars) >> len(self._shifts):
                    self._shifts.append(pow(2, _CHAR_BITS << len(self._shifts), _MODULUS))
                marker = self._anchors[name]
                for way in self._way(form):
                    marker = self._markers.setdefault(way, _Marker(way[0]))
                    marker.uses += 1
                marker.text = form
            self._version += 1
            self._waiting.pop(name, None)

    def _withdraw(self, form: str) -> None:
        """Undo `_announce` and, where it was done, `_lay`, as far as no other chunk needs the markers."""
        name = form[: self.min_chars]
        anchor = marker = self._anchors[name]
        anchor.uses -= 1
        if not anchor.uses:
            del self._anchors[name]
        waiting = self._waiting.get(name, {})
        if form in waiting:
            del waiting[form]
            if not waiting:
                del self._waiting[name]
            return
        for way in self._way(form):
            marker = self._markers[way]
            marker.uses -= 1
            if not marker.uses:
                del self._markers[way]
        marker.text = None
        self._version += 1

    def _way(self, form: str) -> Iterator[tuple[int, int]]:
        """Lengths and hashes at which the search for this chunk stops, behind the anchor."""
        length = self.min_chars
        value = _hash(form[:length])
        rest = len(form) - length
        for bit in range(rest.bit_length() - 1, -1, -1):
            if rest >> bit & 1:
                block = form[length : length + (1 << bit)]
                value = (value * self._shifts[bit] + _hash(block)) % _MODULUS
                length += 1 << bit
                yield length, value


def _forms(text: str) -> tuple[str, ...]:
    """The texts under which a chunk may stand in a prompt; none if it is blank."""
    core = text.strip()
    return tuple(dict.fromkeys((text, core))) if core else ()


def _hash(text: str) -> int:
    """Hash of a text: its characters as one number, modulo a prime."""
    return int.from_bytes(text.encode("utf-32-be", "surrogatepass"), "big") % _MODULUS


def _prefix_hashes(text: str) -> list[int]:
    """Hashes of text[:0], text[:1], ... up to the whole text."""
    return list(accumulate(map(ord, text), lambda h, c: (h << _CHAR_BITS | c) % _MODULUS, initial=0))
